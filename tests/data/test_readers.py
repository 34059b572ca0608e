"""Reader processes: in order, and never waited for in vain."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from soar_mega.data import readers as readers_module
from soar_mega.data.info import DataError
from soar_mega.data.order import Stretch
from soar_mega.data.readers import Readers
from soar_mega.data.shards import Read


def stretch(first):
    return Stretch(bucket="16x16", first=first, position=first, count=1)


def echo(job):
    """The first jobs are the slowest."""
    time.sleep(max(0, 0.05 - 0.02 * job.first))
    values = torch.tensor([job.first], dtype=torch.bfloat16)
    return Read(
        tensors={"x": values}, names=[f"{os.getpid()}"], failures={0: "bad"} if job.first == 3 else {}
    )


def stretches(count):
    return (stretch(first) for first in range(count))


@pytest.fixture
def start():
    made = []

    def make(read, count, jobs=100):
        made.append(Readers(read, stretches(jobs), count))
        return made[-1]

    yield make
    for readers in made:
        readers.close()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_reads_come_in_the_order_of_the_stretches(start, count):
    reads = list(start(echo, count, jobs=7))
    assert [read.tensors["x"].item() for read in reads] == list(range(7))
    assert [read.failures for read in reads] == [{0: "bad"} if i == 3 else {} for i in range(7)]
    assert len({read.names[0] for read in reads}) == max(1, count)
    assert (reads[0].names[0] == str(os.getpid())) == (count == 0)


def grow(job):
    """Reads of different sizes and types, also of nothing."""
    shape = (job.first % 4, 300 * job.first)
    return Read(
        tensors={"x": torch.full(shape, job.first, dtype=torch.bfloat16), "y": torch.arange(3)}, names=[]
    )


def test_reads_may_differ_in_size_and_stay_what_they_were(start):
    for first, read in enumerate(list(start(grow, 2, jobs=12))):
        assert torch.equal(read.tensors["x"], grow(stretch(first)).tensors["x"])
        assert read.tensors["x"].dtype == torch.bfloat16 and read.tensors["y"].tolist() == [0, 1, 2]


def leave_the_pipe_open(job):
    """Dies, while a child still holds its end of the pipe: the parent gets no end of file."""
    if os.fork() == 0:
        time.sleep(15)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("work", [lambda job: time.sleep(60), leave_the_pipe_open])
def test_a_killed_reader_is_reported(start, work):
    readers = start(work, 1)
    (process,) = readers.processes
    if work is not leave_the_pipe_open:
        os.kill(process.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=rf"process 0 \(pid {process.pid}\) was killed by signal 9 \(out of memory"
    ):
        next(readers)
    assert time.monotonic() - begin < 5


def test_the_death_of_a_reader_is_told_where_a_batch_is_asked_for(start):
    """Not wherever the run is at that moment, on this rank alone."""
    readers = start(echo, 1)
    next(readers)
    os.kill(readers.processes[0].pid, signal.SIGKILL)
    time.sleep(0.5)  # in a step
    with pytest.raises(DataError, match="was killed by signal 9"):
        list(readers)


def slow(job):
    time.sleep(0.5)
    return echo(job)


def test_a_slow_reader_is_told_of_and_waited_for(start, monkeypatch, caplog):
    monkeypatch.setattr(readers_module, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(readers_module, "PATIENCE_SECONDS", 0.2)
    readers = start(slow, 1, jobs=1)
    (read,) = readers
    assert read.tensors["x"].item() == 0
    assert (
        f"({readers.processes[0].pid}) are still at the next batch: is the file system slow?" in caplog.text
    )


def unreadable(job):
    raise ValueError("shard-000004.tar is truncated")


def broken(job):
    raise KeyError("a mistake in the code")


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("read", "message"), [(unreadable, r"^shard-000004\.tar is truncated$"), (broken, "Traceback")]
)
def test_what_reading_raises_is_passed_on(start, count, read, message):
    with pytest.raises(DataError, match=message):
        next(start(read, count))


def test_readers_outlive_the_signals_that_a_scheduler_sends_to_every_process(start):
    readers = start(echo, 1)
    next(readers)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(readers.processes[0].pid, number)
    assert [next(readers).tensors["x"].item() for _ in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 1])
def test_readers_end_with_a_parent_that_is_killed(delay):
    """Also before they have begun."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from test_readers import Readers, echo, stretches\n"
        "from soar_mega.data import readers as ours; begin = ours._begin\n"
        f"ours._begin = lambda *numbers: (time.sleep({delay}), begin(*numbers))\n"
        "readers = Readers(echo, stretches(100), 2)\n"
        "print(*[process.pid for process in readers.processes], flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(running(pid) for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(running(pid) for pid in pids)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
