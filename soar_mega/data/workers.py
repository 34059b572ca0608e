"""Reader processes: they read ahead while the model computes, and are never waited for in vain."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from soar_mega.data.info import DataError
from soar_mega.data.order import Stretch
from soar_mega.data.shards import Read
from soar_mega.data.slots import Slot

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # between two messages that a reader is slow
PATIENCE_TO_DIE = 5.0  # seconds
JOBS_AHEAD = 2  # per reader process

ReadStretch = Callable[[Stretch], Read]


class WorkerPool:
    """Runs `read` on stretches in `count` processes; results come back in the order of `submit`.

    With a count of 0 a stretch is read by the caller when its result is asked for. The processes are forked, so
    everything that `read` holds is shared with them at no cost.
    """

    def __init__(self, read: ReadStretch, count: int) -> None:
        self._read = read
        self._waiting: deque[Stretch] = deque()
        self._submitted = self._sent = self._taken = 0
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self._slots = [[Slot() for _ in range(JOBS_AHEAD)] for _ in range(count)]
        for slots in self._slots:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(read, theirs, slots, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    @property
    def depth(self) -> int:
        """How many stretches should be under way."""
        return max(1, JOBS_AHEAD * len(self.processes))

    def submit(self, stretch: Stretch) -> None:
        """Ask for a stretch."""
        self._waiting.append(stretch)
        self._submitted += 1
        self._send()

    def next(self) -> Read:
        """The result of the oldest stretch asked for. DataError when its reader failed or died."""
        stretch = self._waiting.popleft()
        if not self.processes:
            return self._read(stretch)
        worker, turn = self._taken % len(self.processes), self._taken // len(self.processes)
        self._taken += 1
        self._wait(worker, stretch)
        try:
            message = self._connections[worker].recv()
        except (EOFError, OSError) as error:
            raise DataError(self._obituary(worker)) from error
        if isinstance(message, str):
            raise DataError(message)
        layout, names, failures = message
        read = Read(
            tensors=self._slots[worker][turn % JOBS_AHEAD].take(layout), names=names, failures=failures
        )
        self._send()
        return read

    def close(self) -> None:
        """End the reader processes."""
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join(PATIENCE_TO_DIE)  # a process that a file system holds cannot die
        for slot in itertools.chain.from_iterable(self._slots):
            slot.close()
        self._connections, self.processes, self._slots = [], [], []
        self._waiting.clear()

    def _send(self) -> None:
        """Give readers the stretches that they have slots for: each was taken out of before it is used again."""
        while self._sent < min(self._submitted, self._taken + JOBS_AHEAD * len(self.processes)):
            # A dead reader is reported by `next`, where the run can be stopped on all ranks.
            with contextlib.suppress(OSError):
                self._connections[self._sent % len(self.processes)].send(
                    self._waiting[self._sent - self._taken]
                )
            self._sent += 1

    def _wait(self, worker: int, stretch: Stretch) -> None:
        process, connection = self.processes[worker], self._connections[worker]
        reminder = time.monotonic() + PATIENCE_SECONDS
        while not connection.poll(POLL_SECONDS):
            if not process.is_alive() and not connection.poll(0):
                raise DataError(self._obituary(worker))
            if time.monotonic() > reminder:
                log.warning(
                    "reader process %s still works on %s: is the file system slow?", process.pid, stretch
                )
                reminder = time.monotonic() + PATIENCE_SECONDS

    def _obituary(self, worker: int) -> str:
        process = self.processes[worker]
        process.join(POLL_SECONDS)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        advice = " (out of memory? lower data.num_workers)" if code == -signal.SIGKILL else ""
        return f"data reader process {worker} (pid {process.pid}) {how}{advice}"


def _serve(read: ReadStretch, connection: Connection, slots: list[Slot], parent: int) -> None:
    """A reader process: stretches in, (where its tensors lie in a slot, names, failures) or a message out."""
    # The scheduler signals every process of a job; the run decides when its readers end.
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    torch.set_num_threads(1)
    for slot in itertools.cycle(slots):
        # A sibling may hold a copy of the other end of the pipe, so the parent's death is seen by its number.
        while not connection.poll(POLL_SECONDS):
            if os.getppid() != parent:
                return
        try:
            stretch = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result = read(stretch)
            message: object = (slot.put(result.tensors), result.names, result.failures)
        except (ValueError, OSError) as error:
            message = str(error)
        except Exception:  # the traceback would be lost with the process
            message = traceback.format_exc()
        with contextlib.suppress(OSError):
            connection.send(message)
