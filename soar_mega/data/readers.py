"""Processes that read ahead while the model computes: those of torch's DataLoader, never waited for in vain."""

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch.utils.data import DataLoader, Dataset

from soar_mega.data.info import DataError
from soar_mega.data.order import Stretch
from soar_mega.data.shards import Read
from soar_mega.garbage import garbage_waits, leave_garbage_of_parent
from soar_mega.private_names import end_data_loader, is_data_loader_timeout, processes_of_data_loader

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between two looks at whether the processes are alive
DEATH_SECONDS = 0.2  # in which a process that broke a connection is seen to be dead
PATIENCE_SECONDS = 60.0  # between two messages that a read takes long
READ_AHEAD = 2  # stretches, by each process
ReadStretch = Callable[[Stretch], Read]


class Readers:
    """What `read` makes of each of `stretches`, in their order; `count` processes are ahead of who asks.

    With a count of 0 a stretch is read when it is asked for. The processes are forked, so everything that `read` holds
    is shared with them at no cost.

    Args:
        pin_memory: of the tensors, as a GPU likes them; a thread of this process does that too.
    """

    def __init__(
        self, read: ReadStretch, stretches: Iterable[Stretch], count: int, pin_memory: bool = False
    ) -> None:
        loader = DataLoader(
            _Reading(read),
            batch_size=None,
            sampler=stretches,
            num_workers=count,
            prefetch_factor=READ_AHEAD if count else None,
            multiprocessing_context="fork" if count else None,
            worker_init_fn=partial(_begin, os.getpid()),
            timeout=POLL_SECONDS if count else 0,
            pin_memory=pin_memory,
        )
        with _death_is_no_signal(), garbage_waits():
            self._iterator: Iterator[Read | str] = iter(loader)
        self.processes = processes_of_data_loader(self._iterator)

    def __iter__(self) -> Iterator[Read]:
        return self

    def __next__(self) -> Read:
        """DataError when the next stretch could not be read, or a process has died."""
        reminder = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                read = next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:
                if is_data_loader_timeout(error):
                    if time.monotonic() > reminder:
                        self._remind()
                        reminder += PATIENCE_SECONDS
                    continue
                raise DataError(self._obituary() or f"a batch was lost on its way: {error!r}") from error
            if isinstance(read, str):
                raise DataError(read)
            return read

    def close(self) -> None:
        """End the processes."""
        end_data_loader(self._iterator)
        for process in self.processes:
            process.kill()  # one that is in a long read; there is no waiting for one that a file system holds

    def _remind(self) -> None:
        pids = ", ".join(str(process.pid) for process in self.processes)
        log.warning("the reader processes (%s) are still at the next batch: is the file system slow?", pids)

    def _obituary(self) -> str:
        """Of the first process that is dead; "" where all are alive."""
        for number, process in enumerate(self.processes):
            process.join(DEATH_SECONDS)
            code = process.exitcode
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                advice = " (out of memory? lower data.num_workers)" if code == -signal.SIGKILL else ""
                return f"data reader process {number} (pid {process.pid}) {how}{advice}"
        return ""


class _Reading(Dataset[Read | str]):
    """The tensors of a stretch, or the message why there are none."""

    def __init__(self, read: ReadStretch) -> None:
        self._read = read

    def __getitem__(self, stretch: Stretch) -> Read | str:
        try:
            return self._read(stretch)
        except (ValueError, OSError) as error:
            return str(error)
        except Exception:  # the traceback would be lost with the process
            return traceback.format_exc()


def _begin(parent: int, number: int) -> None:
    """The scheduler signals every process of a job; the run decides when its readers end, and they end with it."""
    leave_garbage_of_parent()
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent: int) -> None:
    """torch looks for its parent too, but would take for it whoever is in its place once it is dead."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def _death_is_no_signal() -> Iterator[None]:
    """Takes back the handler by which torch raises the death of a process wherever the run is at that moment.

    It is found when a batch is asked for, where the run can be stopped on all ranks.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
