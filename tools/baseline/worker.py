"""Each arm of a comparison lives in a process of its own, so that its peak memory is its own; the parent
gives the turns.
"""

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode


class Arm(Protocol):
    """One way of training, ready to run."""

    def step(self) -> None:
        """One optimizer step on one global batch."""


class Worker:
    """A child process that builds an arm and runs its steps when asked."""

    def __init__(self, name: str, build: Callable[..., Arm], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
        self._process.start()
        theirs.close()

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
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, what: str) -> Any:
        try:
            self._pipe.send(what)
            kind, value = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join(timeout=10)
            raise RuntimeError(
                f"the process of {self.name} ended with exit code {self._process.exitcode}"
            ) from error
        if kind == "error":
            raise RuntimeError(f"{self.name} failed:\n{value}")
        return value


def _serve(pipe: Connection, build: Callable[..., Arm], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        memory = Memory()
        arm = build(*args)
        memory.forget_peak()
        while True:
            what = pipe.recv()
            if what == "step":
                pipe.send(("seconds", _timed(arm)))
            elif what == "flops":
                pipe.send(("flops", count_flops(arm.step)))
            else:
                pipe.send(("bytes", memory.peak()))
    except EOFError:
        return
    except Exception:
        pipe.send(("error", traceback.format_exc()))


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
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Memory:
    """Peak memory of this process above where it began: resident memory on the CPU, allocated memory on a
    GPU.
    """

    def __init__(self) -> None:
        self._start = torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")

    def forget_peak(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present

    def peak(self) -> int:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        return peak - self._start


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; peak memory is measured on Linux only")
