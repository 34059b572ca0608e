"""When a run is to stop early: a signal of the job scheduler, Ctrl-C, or the end of its time."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from soar_mega.phases import phases

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Stop signals wait until this is left, and processes that are started meanwhile never get them.

    A scheduler signals every process of a job, also the helpers that write a checkpoint: they would die of it.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt meanwhile, as Ctrl-C does: who runs another process can end it first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Turns SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and the time limit into one decision that all ranks share.

    A second Ctrl-C is not waited with: it ends the process as it always does.

    A signal reaches the ranks at different moments, and clocks differ: the step after which a run stops is agreed on by
    a MAX all-reduce, or some ranks would save while others wait for them in the next step.

    Args:
        duration_minutes: time limit counted from the creation of this object (checkpoint loading counts too), or None.
    """

    def __init__(self, duration_minutes: float | None) -> None:
        self._deadline = None if duration_minutes is None else time.monotonic() + 60.0 * duration_minutes
        self._signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            logger.info(
                "Ctrl-C: the run is saved after this step; press it again to end at once, with nothing saved"
            )

    def reason(self) -> str | None:
        """Why to stop now, or None. Collective over the world: every rank gets the same answer."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        votes = torch.tensor([self._signal, int(late)], dtype=torch.int32)  # the host waits for hosts alone
        with phases.waiting():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        number, is_late = votes.tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        return "the end of train.exit_duration_in_mins" if is_late else None
