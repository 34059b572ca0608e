"""A function that runs on a copy of this process's memory while this process goes on."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

import torch

from soar_mega.faults.signals import held_back
from soar_mega.garbage import garbage_waits, leave_garbage_of_parent

T = TypeVar("T")

_FORK = multiprocessing.get_context("fork")  # the copy: memory is shared until one of the two writes to it
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Background(Generic[T]):
    """Starts `function` in a process of its own, which may use no GPU and talk to no other rank.

    Stop signals do not reach it; it ends when this process ends, however that comes about.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._receiver, sender = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_work, args=(function, sender, os.getpid()), daemon=True)
        with held_back(), garbage_waits():
            self._process.start()
        sender.close()

    def done(self) -> bool:
        """Whether `outcome` would return at once."""
        return self._receiver.poll()

    def outcome(self) -> T | Exception:
        """What the function returned or raised; waits for it. To be asked for once."""
        try:
            result: T | Exception = self._receiver.recv()
        except EOFError:
            self._process.join()
            result = RuntimeError(
                f"the process that was writing it has died (exit code {self._process.exitcode})"
            )
        self._receiver.close()  # multiprocessing joins it some time later: taking down its memory takes a while
        return result

    def kill(self) -> None:
        """Ends it in the middle of its work."""
        self._process.kill()
        self._process.join()
        self._receiver.close()


def attempt(function: Callable[[], T]) -> T | Exception:
    """What a function returns or raises."""
    try:
        return function()
    except Exception as error:
        return error


def die_with_parent(parent: int) -> Callable[[], None]:
    """What a process does first that is to be killed when `parent`, the one that started it, ends in whatever way."""

    def watched() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(1)

    return watched


def _work(function: Callable[[], T], sender: Connection, parent: int) -> None:
    die_with_parent(parent)()
    leave_garbage_of_parent()
    # nothing open is kept: when the parent dies its peers see that at once, and its lock is free
    os.closerange(3, sender.fileno())
    os.closerange(sender.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    torch.set_num_threads(1)  # the parent's threads have not come along
    sender.send(attempt(function))
    sender.close()
    os._exit(0)  # nothing of the parent's is to be torn down here
