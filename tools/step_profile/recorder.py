"""When a process did what: spans within spans, on the host's clock, the process's, and where there is one the GPU's."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from soar_mega.phases import Phases


@dataclass
class Span:
    """Something that was done, in seconds since the recording began."""

    name: str
    phase: str  # of the step
    depth: int
    start: float
    process_start: float
    end: float = 0.0
    process_end: float = 0.0  # of the processor time of all threads of this process
    device_start: float | None = None  # when the GPU came to it
    device_end: float | None = None


class Recorder:
    """Spans of this process, from `start` until `stop`. A phase ends where the next one begins."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.notes: list[tuple[float, int]] = []  # memory at the ends of spans
        self._open: list[tuple[Span, Any]] = []
        self._events: list[tuple[Span, Any, Any]] = []

    def start(self, memory: Callable[[], int]) -> None:
        """Begins; ranks that call it behind one barrier have one zero."""
        self._memory = memory
        self._is_on_gpu = torch.cuda.is_available()
        if self._is_on_gpu:
            torch.cuda.synchronize()
            self._zero_event = self._event()
        self._zero, self._process_zero = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Ends all spans, and waits until the GPU has come to the ends."""
        self.close()
        if self._is_on_gpu:
            torch.cuda.synchronize()
            for span, first, last in self._events:
                span.device_start, span.device_end = (
                    self._zero_event.elapsed_time(event) / 1e3 for event in (first, last)
                )

    def begin(self, name: str) -> None:
        """A span within the one that is open."""
        phase = self._open[0][0].name if self._open else name
        span = Span(name, phase, len(self._open), self._now(), self._process_now())
        self._open.append((span, self._event() if self._is_on_gpu else None))

    def end(self) -> None:
        """Ends the innermost span."""
        span, first = self._open.pop()
        span.end, span.process_end = self._now(), self._process_now()
        self.spans.append(span)
        self.notes.append((span.end, self._memory()))
        if self._is_on_gpu:
            self._events.append((span, first, self._event()))

    def enter(self, phase: str) -> None:
        """Ends the phase that is open, with all in it, and begins another one."""
        self.close()
        self.begin(phase)

    def close(self) -> None:
        """Ends all that is open."""
        while self._open:
            self.end()

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function with a span around each call."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return called

    @contextlib.contextmanager
    def following(self, phases: Phases) -> Iterator[None]:
        """The library's phases are spans."""
        enter = phases.enter

        def entered(phase: str) -> None:
            enter(phase)
            self.enter(phase)

        phases.enter = entered  # type: ignore[method-assign]
        try:
            yield
        finally:
            del phases.enter  # the class has it

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _process_now(self) -> float:
        return time.process_time() - self._process_zero

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
