"""Who is where: each rank's state in the store that all ranks of a run share, for when something goes wrong.

Each rank says every few seconds where it is. When a rank sees that the run cannot go on, it calls the roll, and all
ranks that live answer. A rank that does not is stopped or gone, and what it said last tells where that happened.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from soar_mega.phases import phases
from soar_mega.private_names import default_store

ROOT = str(Path(__file__).parents[1])
STORE_TIMEOUT = timedelta(seconds=10)
# where Python stands while it waits for other ranks
COMMUNICATION = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication",
    "megatron/core/distributed/",
    "soar_mega/engines/channel",
)


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a rank was when it said so."""

    rank: int
    host: str
    pid: int
    said: int  # how often it has said where it was: clocks of two hosts cannot be compared
    step: int
    phase: str
    number: int  # of the phase; all ranks go through the same ones
    seconds: float  # in the phase
    place: str  # of its main thread; told in answers only
    waits: bool  # for other ranks, as far as Python shows it
    answers: bool  # said after the roll was called


class RollCall:
    """This rank's view of the store. Every method raises RuntimeError when the store does not answer."""

    def __init__(self, main_thread: int) -> None:
        self._main_thread = main_thread
        self._lock, self._answered, self._said = threading.Lock(), False, 0
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: its number, and when it was new here
        # a connection of its own: the main thread may be waiting on the other one
        store = default_store().clone()
        store.set_timeout(STORE_TIMEOUT)
        self._store = dist.PrefixStore("roll_call", store)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def say(self, answers: bool = False, error: BaseException | None = None) -> None:
        """Tells all ranks where this one is; an answer says where its main thread is, or where the error was raised."""
        place, communicates = self._place(error) if answers else ("", False)
        self._said += 1
        state = State(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            said=self._said,
            step=phases.step,
            phase=phases.phase,
            number=phases.number,
            seconds=time.monotonic() - phases.entered,
            place=place,
            waits=communicates or phases.is_waiting,
            answers=answers,
        )
        with self._lock:
            self._answered |= answers
            # what the watching thread says later does not replace an answer
            if state.answers == self._answered:
                self._store.set(str(self.rank), json.dumps(dataclasses.asdict(state)))

    def call(self, why: str) -> None:
        """Calls the roll; the first call counts."""
        self._store.compare_set("why", "", why)

    def called(self) -> str | None:
        """Why the roll was called, or None."""
        return self._get("why")

    def confess(self, what: str) -> None:
        """Tells all ranks that this one failed, and of what; the first confession counts."""
        self._store.compare_set("raised", "", what)

    def confession(self) -> str | None:
        """What a rank said that it failed of, or None."""
        return self._get("raised")

    def states(self) -> list[State]:
        """What each rank said last, in order; all ranks must have said something."""
        said = self._store.multi_get([str(rank) for rank in range(self.world_size)])
        states = [State(**json.loads(text)) for text in said]
        now = time.monotonic()
        for state in states:
            if state.rank not in self._seen or self._seen[state.rank][0] != state.said:
                self._seen[state.rank] = state.said, now
        return states

    def silences(self) -> dict[int, float]:
        """Seconds by rank since it was last seen to say something: by this rank, which has looked at `states`, or by
        the one that has told (`tell_silences`) because it looks all the time."""
        now = time.monotonic()
        mine = {rank: now - when for rank, (_, when) in self._seen.items()}
        told = json.loads(self._get("silences") or "{}")
        return mine | {
            int(rank): seconds for rank, seconds in told.items() if seconds > mine.get(int(rank), 0.0)
        }

    def tell_silences(self, silences: Mapping[int, float]) -> None:
        """Tells all ranks who is silent, for the one that will write the report."""
        self._store.set("silences", json.dumps(silences))

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _place(self, error: BaseException | None) -> tuple[str, bool]:
        """Where the main thread is or the error was raised, and whether that is in communication with other ranks."""
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
        else:
            frames = traceback.extract_stack(sys._current_frames()[self._main_thread])
        innermost = frames[-1]
        own = next((frame for frame in reversed(frames) if frame.filename.startswith(ROOT)), innermost)
        place = _named(innermost) + (f" for {_named(own)}" if own is not innermost else "")
        return place, any(part in innermost.filename for part in COMMUNICATION)


def _named(frame: traceback.FrameSummary) -> str:
    return f"{frame.name} ({os.path.basename(frame.filename)}:{frame.lineno})"
