"""Where this process is in its run, and how long it has waited for its peers.

One per process, like its log: the loop says what it does, whoever waits for other ranks says so, and watchdogs,
messages and timers read it. On a GPU the host is ahead of what it told the device to do, and waits for nothing: times
are those at which the device came by, and are looked up when they are asked for.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

Mark = float | torch.cuda.Event  # a place in time: of the host, or of the device


@dataclass
class _Wait:
    begin: Mark
    end: Mark | None = None


@dataclass
class _Span:
    """A phase from its begin to its end, and what it waited in between."""

    phase: str
    begin: Mark
    end: Mark | None = None
    of_step: bool = True
    waits: list[_Wait] = field(default_factory=list)

    def own_seconds(self) -> float:
        """Without the waits; when all of it is past."""
        assert self.end is not None
        waited = sum(_seconds(wait.begin, wait.end) for wait in self.waits if wait.end is not None)
        return _seconds(self.begin, self.end) - waited


class Phases:
    """The phase of this process, and its own seconds by phase of the steps since they were taken last.

    Attributes:
        step: the step that is computed, or the last one; the first one is 1.
        phase: what the process does.
        number: counts phases. All ranks go through the same ones, so a rank with a smaller number is behind.
        entered: when the phase began, and
        step_began: when the step did, None where no step is under way: by time.monotonic().
        steps_begun: of this process.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets everything: a run begins."""
        self.step, self.phase, self.number = 0, "start", 0
        self.entered = time.monotonic()
        self.step_began: float | None = None
        self.steps_begun = 0
        # those that the device has not come past, and this one
        self._spans = deque([_Span("start", self.entered)])
        self._seconds: dict[str, float] = {}

    @property
    def began(self) -> float:
        """When the step began, or where none is under way the phase: by time.monotonic()."""
        began = self.step_began
        return self.entered if began is None else began

    @property
    def is_waiting(self) -> bool:
        """Whether this process, or what it has its device do, has come to a wait and not past it."""
        waits = [wait for span in list(self._spans) for wait in list(span.waits)]
        return any(_is_past(wait.begin) and (wait.end is None or not _is_past(wait.end)) for wait in waits)

    def begin_step(self, step: int, phase: str) -> None:
        """Begins a step with its first phase."""
        self.enter(phase)
        self.step, self.step_began = step, self.entered
        self.steps_begun += 1

    def enter(self, phase: str) -> None:
        """Goes on to another phase of the step."""
        mark, last = _mark(), self._spans[-1]
        last.end, last.of_step = mark, self.step_began is not None
        self._spans.append(_Span(phase, mark))
        self._look_back()
        self.phase, self.entered = phase, time.monotonic()
        self.number += 1

    def leave_step(self, phase: str) -> None:
        """Goes on to something that is not a step and may take long: a checkpoint, measurements, the export."""
        self.enter(phase)
        self.step_began = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective: the time in it is not this process's own."""
        wait = _Wait(_mark())
        self._spans[-1].waits.append(wait)
        try:
            yield
        finally:
            wait.end = _mark()

    def take_seconds(self) -> dict[str, float]:
        """Own seconds by phase of the steps since the last call. Waits for what the device has been told so far."""
        begin = self._spans[-1].begin
        if not isinstance(begin, float):
            begin.synchronize()
        self._look_back()
        taken, self._seconds = self._seconds, {}
        return taken

    def _look_back(self) -> None:
        """Count in what is past."""
        while self._spans[0].end is not None and _is_past(self._spans[0].end):
            span = self._spans.popleft()
            if span.of_step:
                self._seconds[span.phase] = self._seconds.get(span.phase, 0.0) + span.own_seconds()


def _mark() -> Mark:
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_past(mark: Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(end, float):
        return end - begin if isinstance(begin, float) else 0.0
    return 0.0 if isinstance(begin, float) else begin.elapsed_time(end) / 1000.0


phases = Phases()
