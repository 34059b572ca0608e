"""Where this process is in its run, and how long it has waited for its peers.

One per process, like its log: the loop says what it does, whoever waits for other ranks says so, and watchdogs,
messages and timers read it.
"""

import contextlib
import time
from collections.abc import Iterator

import torch


class Phases:
    """The phase of this process, and its own seconds by phase of the steps since they were taken last.

    Attributes:
        step: the step that is computed, or the last one; the first one is 1.
        phase: what the process does.
        number: counts phases. All ranks go through the same ones, so a rank with a smaller number is behind.
        entered: when the phase began, and
        step_began: when the step did, None where no step is under way: by time.monotonic().
        steps_begun: of this process.
        is_waiting: inside `waiting`.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets everything: a run begins."""
        self.step, self.phase, self.number = 0, "start", 0
        self.entered = time.monotonic()
        self.step_began: float | None = None
        self.steps_begun = 0
        self.is_waiting = False
        self._waited = 0.0  # in this phase
        self._seconds: dict[str, float] = {}

    @property
    def began(self) -> float:
        """When the step began, or where none is under way the phase: by time.monotonic()."""
        began = self.step_began
        return self.entered if began is None else began

    def begin_step(self, step: int, phase: str) -> None:
        """Begins a step with its first phase."""
        self.enter(phase)
        self.step, self.step_began = step, self.entered
        self.steps_begun += 1

    def enter(self, phase: str) -> None:
        """Goes on to another phase of the step."""
        now = time.monotonic()
        if self.step_began is not None:
            own = now - self.entered - self._waited
            self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + own
        self.phase, self.entered, self._waited = phase, now, 0.0
        self.number += 1

    def leave_step(self, phase: str) -> None:
        """Goes on to something that is not a step and may take long: a checkpoint, measurements, the export."""
        self.enter(phase)
        self.step_began = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective whose result is needed at once: the time in it is not this process's own."""
        _finish_computing()  # its own work ends here; the result would be waited for anyway
        began, self.is_waiting = time.monotonic(), True
        try:
            yield
            _finish_computing()
        finally:
            self.is_waiting = False
            self._waited += time.monotonic() - began

    def take_seconds(self) -> dict[str, float]:
        """Own seconds by phase of the steps since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


def _finish_computing() -> None:
    """Wait for what this process computes on a GPU. The device as a whole may hold messages that peers still owe."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().record_event().synchronize()


phases = Phases()
