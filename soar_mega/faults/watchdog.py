"""A thread per rank that ends a run which cannot go on, with one message that says which rank it was, and where.

Three things end a run: a rank raises; the connection to a rank breaks, because it died; a step, or what is done between
steps, takes too long (limits.py), because a rank hangs. Whoever notices calls the roll (roll_call.py). Every rank that
lives answers, writes the stacks of its threads and leaves; one of them says what was found (failure_report.py):

    failures/20261122-023351/report.txt          the message
    failures/20261122-023351/rank_00002.txt      what rank 2 raised, or its Python stacks
    failures/20261122-023351/rank_00002.nccl     NCCL's flight recorder, where there is one
"""

import contextlib
import faulthandler
import logging
import re
import signal
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from soar_mega.config import TrainConfig
from soar_mega.faults.agreement import is_quiet, leave, on_rank_zero, say_why
from soar_mega.faults.failure_report import failure_report
from soar_mega.faults.limits import (
    Limit,
    ending_seconds,
    grace_seconds,
    last_resort_seconds,
    limit,
    poll_seconds,
)
from soar_mega.faults.roll_call import RollCall, State
from soar_mega.faults.signals import STOP_SIGNALS
from soar_mega.phases import phases
from soar_mega.private_names import nccl_trace

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 20.0  # until rank 0 warns; torchrun and srun leave 30 s between SIGTERM and SIGKILL
STDERR = 2  # the number of the file: nothing of Python's that could be held
LOST_POLLS = 3  # polls without an answer of the store
LOST_CONNECTION = re.compile(r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting")


class Watchdog:
    """Ends this process, and with it the run, when the run cannot go on. Collective at its start.

    As a context: an exception that leaves it ends the process where there are other ranks, which might wait for it in
    any collective; a process alone passes it on.

    Args:
        folder: of this start's reports; made when there is something to write.
        train: the limits. Time in which the process was stopped as a whole does not count.
    """

    def __init__(self, folder: Path, train: TrainConfig) -> None:
        self._folder = folder
        self._train = train
        self._roll = RollCall(threading.get_ident())
        self._ending = threading.Lock()
        self._stopped = threading.Event()
        self._poll, self._grace = poll_seconds(self._roll.world_size), grace_seconds(self._roll.world_size)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._missed: set[int] = set()

    def __enter__(self) -> "Watchdog":
        self._roll.say()
        dist.barrier()  # from here on, every rank has said something
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._roll.world_size > 1:
            self.end(error)
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def end(self, error: Exception) -> NoReturn:
        """Ends this process for what it raised, and the others with it."""
        self._begin_end()
        if is_lost_connection(error):
            self._call_roll(f"a connection to another rank broke or timed out ({_first_line(error)})", error)
        said = f"rank {self._roll.rank} stops in {_here()}: {error}"
        self._write_stacks(error)
        with contextlib.suppress(RuntimeError):
            if is_quiet(error):
                self._await_confession()  # or the death of this rank would be noticed first
            else:
                self._roll.confess(said)
                if self._claim(said):
                    say_why(error, f" in {_here()}")
        leave()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are the main thread's
        lived, began, last, unanswered = 0.0, phases.began, time.monotonic(), 0
        while not self._stopped.wait(self._poll):
            # in this order: what begins between the two lines has its whole time
            allowed = limit(self._train, phases)
            begins, now = phases.began, time.monotonic()
            # a process that was stopped (ctrl-Z, SIGSTOP) has not used its time
            lived = lived + min(now - last, 2.0 * self._poll) if begins == began else 0.0
            began, last = begins, now
            try:
                self._roll.say()
                raised, why, unanswered = self._roll.confession(), self._roll.called(), 0
                if self._roll.rank == 0:
                    self._look_for_the_silent()
            except RuntimeError:
                raised, why, unanswered = None, None, unanswered + 1
            if unanswered >= LOST_POLLS:
                self._begin_end()
                self._call_roll("the store of the run, which torchrun or rank 0 keeps, does not answer")
            if raised is not None:
                self._begin_end()
                leave()
            if why is not None:
                self._begin_end()
                self._call_roll(why)
            if allowed is not None and lived > allowed.seconds:
                self._begin_end()
                minutes = allowed.seconds / 60.0
                self._call_roll(f"{allowed.of} takes longer than {minutes:g} minutes ({allowed.setting})")
            if self._roll.world_size > 1 and not self._ending.locked():
                self._wind_last_resort(allowed)

    def _wind_last_resort(self, allowed: Limit | None) -> None:
        """Native code that holds Python's lock also holds this thread: then C ends the process."""
        if allowed is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            seconds = last_resort_seconds(allowed.seconds, self._roll.world_size)
            faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)

    def _look_for_the_silent(self) -> None:
        """Warns, once for each rank, before a launcher's patience with the others ends."""
        states = self._roll.states()
        patience = SILENCE_SECONDS + 2.0 * self._poll
        silences = {rank: silence for rank, silence in self._roll.silences().items() if silence > patience}
        if silences or self._missed:
            self._roll.tell_silences(silences)
        for state in (states[rank] for rank in silences):
            if state.rank not in self._missed:
                self._missed.add(state.rank)
                logger.warning(
                    "rank %d (process %d on %s) has given no sign of life for %.0f s: last seen in step %d, phase %s",
                    *(state.rank, state.pid, state.host, silences[state.rank], state.step, state.phase),
                )

    def _begin_end(self) -> None:
        """Lets one thread through."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other one ends the process
        # whatever blocks from here on (a full pipe, a file system): the process ends
        faulthandler.dump_traceback_later(ending_seconds(self._roll.world_size), exit=True, file=STDERR)

    def _call_roll(self, why: str, error: Exception | None = None) -> NoReturn:
        """Calls the roll or answers it, tells the result unless another rank does, and ends the process."""
        states: list[State] = []
        silences: dict[int, float] = {}
        raised = None
        with contextlib.suppress(RuntimeError):
            raised = self._roll.confession()
            self._roll.call(why)
            self._roll.say(answers=True, error=error)
        self._write_stacks(error)
        if raised is None and self._claim(""):
            with contextlib.suppress(RuntimeError):  # a store that is gone leaves what is known
                deadline = time.monotonic() + self._grace
                states = self._roll.states()
                while time.monotonic() < deadline and not all(state.answers for state in states):
                    time.sleep(0.2)
                    states = self._roll.states()
                silences = self._roll.silences()
                raised = self._roll.confession()
            report = f"the run ends: {raised}" if raised else failure_report(why, states, silences)
            logger.error("%s\n  stacks of the ranks that live: %s", report, self._folder)
            with contextlib.suppress(OSError):
                self._report().write_text(report + "\n")
        else:
            time.sleep(self._grace + 1.0)  # a launcher would end the others, and rank 0 may keep the store
        leave()

    def _await_confession(self) -> None:
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline and self._roll.confession() is None:
            time.sleep(self._poll)

    def _claim(self, report: str) -> bool:
        """Whether this rank is the one that reports; a report already known is written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._report(), "x") as file:
                file.write(report)
        except FileExistsError:
            return False
        except OSError:  # then better said twice than never
            return True
        return True

    def _write_stacks(self, error: Exception | None) -> None:
        """What was raised, and where all threads of this rank are."""
        file = self._folder / f"rank_{self._roll.rank:05d}.txt"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            raised = "" if error is None else "".join(traceback.format_exception(error))
            file.write_text(f"in {_here()}\n{raised}")
            with open(file, "a") as opened:
                faulthandler.dump_traceback(opened, all_threads=True)
        if torch.cuda.is_available() and "nccl" in dist.get_backend():
            with contextlib.suppress(OSError, RuntimeError):
                recorded = nccl_trace()
                file.with_suffix(".nccl").write_bytes(recorded)

    def _report(self) -> Path:
        return self._folder / "report.txt"


def reports_folder(run: Path) -> Path:
    """The folder for the reports of this start of a run. Collective."""
    return run / "failures" / on_rank_zero(lambda: time.strftime("%Y%m%d-%H%M%S"))


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that another rank could not be reached."""
    while error is not None:
        if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
            return True
        if type(error) is RuntimeError and LOST_CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _here() -> str:
    return f"step {phases.step}, phase {phases.phase}"


def _first_line(error: Exception) -> str:
    """Without the place in torch's sources that it may begin with, and without torch's advice."""
    return re.sub(r"^\[\S*\] ", "", str(error)).split(". ")[0].split("\n")[0][:200]
