"""Reader processes: in order, and never waited for in vain."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from soar_mega.data.info import DataError
from soar_mega.data.order import Stretch
from soar_mega.data.shards import Read
from soar_mega.data.workers import WorkerPool


def stretch(first):
    return Stretch(bucket="16x16", first=first, position=first, count=1)


def echo(job):
    """The first jobs are the slowest."""
    time.sleep(max(0, 0.05 - 0.02 * job.first))
    values = torch.tensor([job.first], dtype=torch.bfloat16)
    return Read(
        tensors={"x": values}, names=[f"{os.getpid()}"], failures={0: "bad"} if job.first == 3 else {}
    )


@pytest.fixture
def pools():
    made = []

    def make(read, count):
        made.append(WorkerPool(read, count))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs(pools, count):
    pool = pools(echo, count)
    for first in range(7):
        pool.submit(stretch(first))
    reads = [pool.next() for _ in range(7)]
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


@pytest.mark.parametrize("count", [1, 2])
def test_reads_may_differ_in_size_and_stay_what_they_were(pools, count):
    pool = pools(grow, count)
    for first in range(12):
        pool.submit(stretch(first))
    reads = [pool.next() for _ in range(12)]
    for first, read in enumerate(reads):
        assert torch.equal(read.tensors["x"], grow(stretch(first)).tensors["x"])
        assert read.tensors["x"].dtype == torch.bfloat16 and read.tensors["y"].tolist() == [0, 1, 2]


def leave_the_pipe_open(job):
    """Dies, while a child still holds its end of the pipe: the parent gets no end of file."""
    if os.fork() == 0:
        time.sleep(15)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("work", [lambda job: time.sleep(60), leave_the_pipe_open])
def test_a_killed_reader_is_reported(pools, work):
    pool = pools(work, 1)
    pool.submit(stretch(0))
    if work is not leave_the_pipe_open:
        os.kill(pool.processes[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=rf"pid {pool.processes[0].pid}\) was killed by signal 9 \(out of memory"
    ):
        pool.next()
    assert time.monotonic() - start < 5


def test_a_reader_that_is_dead_before_the_job_is_reported(pools):
    pool = pools(echo, 1)
    os.kill(pool.processes[0].pid, signal.SIGKILL)
    pool.processes[0].join()
    pool.submit(stretch(0))
    with pytest.raises(DataError, match="was killed by signal 9"):
        pool.next()


def unreadable(job):
    raise ValueError("shard-000004.tar is truncated")


def broken(job):
    raise KeyError("a mistake in the code")


@pytest.mark.parametrize(
    ("read", "message"), [(unreadable, r"^shard-000004\.tar is truncated$"), (broken, "Traceback")]
)
def test_what_a_reader_raises_is_passed_on(pools, read, message):
    pool = pools(read, 1)
    pool.submit(stretch(0))
    with pytest.raises(DataError, match=message):
        pool.next()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_readers_outlive_the_signals_that_a_scheduler_sends_to_every_process(pools, number):
    pool = pools(echo, 1)
    pool.submit(stretch(0))
    pool.next()
    os.kill(pool.processes[0].pid, number)
    pool.submit(stretch(1))
    assert pool.next().tensors["x"].item() == 1


def test_readers_end_with_a_parent_that_is_killed():
    code = (
        "import os, signal, sys, time; sys.path.insert(0, sys.argv[1]); from test_workers import WorkerPool, echo\n"
        "pool = WorkerPool(echo, 2)\n"
        "print(*[process.pid for process in pool.processes], flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(running(pid) for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(running(pid) for pid in pids)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
