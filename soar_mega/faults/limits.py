"""How long a rank may take for a step or another phase, and how long, therefore, it waits for others in a collective.

The watchdog must lose patience first, because it alone says which rank was to blame: what torch and NCCL end by
themselves comes later, whatever the settings.
"""

from dataclasses import dataclass
from datetime import timedelta

from soar_mega.config import TrainConfig
from soar_mega.phases import Phases

FIRST_STEPS, FIRST_STEPS_FACTOR = 2, 3  # these compile, and allocate memory
ENDING_SECONDS = 20.0  # for files, beyond the time for answers
ANY_TIME = timedelta(days=20)  # torch counts the milliseconds of some waits in 31 bits


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The time of what a rank does."""

    seconds: float
    of: str  # as in: step 3
    setting: str


def limit(train: TrainConfig, now: Phases) -> Limit | None:
    """The limit of what a rank does now, None for any time."""
    if now.step_began is None:
        minutes, setting = train.phase_timeout_minutes, "train.phase_timeout_minutes"
        of = f"phase {now.phase} after step {now.step}"
    else:
        minutes, setting, of = train.step_timeout_minutes, "train.step_timeout_minutes", f"step {now.step}"
        if minutes is not None and now.steps_begun <= FIRST_STEPS:
            minutes *= FIRST_STEPS_FACTOR
    return None if minutes is None else Limit(seconds=60.0 * minutes, of=of, setting=setting)


def poll_seconds(world_size: int) -> float:
    """Between two words of a rank to the others: the store of 10,000 ranks gets 1000 messages a second."""
    return 1.0 + world_size / 500


def grace_seconds(world_size: int) -> float:
    """In which all ranks that live answer a roll call."""
    return 2.0 * poll_seconds(world_size) + 3.0


def ending_seconds(world_size: int) -> float:
    """From the moment that a rank begins to end to its end, come what may."""
    return 2.0 * grace_seconds(world_size) + ENDING_SECONDS


def last_resort_seconds(seconds: float, world_size: int) -> float:
    """When a process ends that was to end after so many seconds, and whose watchdog did not get to run."""
    return 2.0 * seconds + grace_seconds(world_size)


def collective_timeout(train: TrainConfig, world_size: int) -> timedelta:
    """How long a rank waits for others in a collective: until any watchdog has ended the run long ago."""
    if train.step_timeout_minutes is None or train.phase_timeout_minutes is None:
        return ANY_TIME
    longest = 60.0 * max(FIRST_STEPS_FACTOR * train.step_timeout_minutes, train.phase_timeout_minutes)
    seconds = last_resort_seconds(longest, world_size) + ending_seconds(world_size)
    return min(timedelta(minutes=seconds // 60 + 1), ANY_TIME)
