"""Each arm of a comparison lives in a process of its own, so that its peak memory is its own; the parent
gives the turns.
"""

import gc
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode


class Arm(Protocol):
    """One way of training, ready to run."""

    def step(self) -> None:
        """One optimizer step on one global batch."""


class Failed(RuntimeError):
    """What an arm was asked for went wrong in its process, which can be given another arm."""

    def __init__(self, name: str, reason: str, report: str) -> None:
        super().__init__(f"{name} failed:\n{report}")
        self.reason = reason  # in a line


class Worker:
    """A child process that builds arms, one at a time, and runs their steps when asked. It imports at once."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def build(self, arm: tuple[Callable[..., Arm], tuple[Any, ...]]) -> None:
        """An arm, called with its arguments, in the place of the one before, whose memory is freed.

        Raises:
            Failed: here and below: the arm could not be built, or not do what it was asked for.
        """
        self._ask("build", *arm)

    def step(self) -> float:
        """Seconds of one step."""
        return self._ask("step")

    def flops(self) -> int:
        """Floating-point operations of one step, counted."""
        return self._ask("flops")

    def peak_memory(self) -> int:
        """Most bytes in use at once in the steps so far, less what was in use before the arm was built."""
        return self._ask("peak_memory")

    def close(self) -> None:
        """Ends the process at once: it has nothing to write down, and what it holds goes with it."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _ask(self, *what: Any) -> Any:
        try:
            self._pipe.send(what)
            kind, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join(timeout=10)
            reason = f"the process of {self.name} ended with exit code {self._process.exitcode}"
            raise Failed(self.name, reason, reason) from error
        if kind == "error":
            raise Failed(self.name, *value)
        return value


def _serve(pipe: Connection) -> None:
    from baseline import our_arm, published_arm  # noqa: F401  # what is imported is no arm's memory or time

    warnings.simplefilter("ignore")
    arm: Arm | None = None
    memory = Memory()
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            return
        try:
            if what == "build":
                arm = None
                _free()
                memory = Memory()
                arm = args[0](*args[1])
                memory.forget_peak()
                pipe.send(("built", None))
                continue
            assert arm is not None
            if what == "step":
                pipe.send(("seconds", _timed(arm)))
            elif what == "flops":
                pipe.send(("flops", count_flops(arm.step)))
            else:
                pipe.send(("bytes", memory.peak()))
        except Exception as error:
            arm = None
            pipe.send(("error", (reason_of(error), traceback.format_exc())))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _timed(arm: Arm) -> float:
    _synchronize()
    start = time.perf_counter()
    arm.step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention in a call."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        function()
    return counter.get_total_flops()


def _addmm_flops(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """By the shapes of total += left right, as weight gradients are added up, a call that torch does not count."""
    return 2 * left[0] * left[1] * right[1]


class Memory:
    """Peak memory of this process above where it began: resident memory on the CPU, on a GPU what torch's allocator
    has taken of it. What it has given out leaves out the memory of CUDA graphs, to which every replay writes.
    """

    def __init__(self) -> None:
        self._start = torch.cuda.memory_reserved() if torch.cuda.is_available() else _status("VmRSS")

    def forget_peak(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present

    def peak(self) -> int:
        peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else _status("VmHWM")
        return peak - self._start


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; peak memory is measured on Linux only")
