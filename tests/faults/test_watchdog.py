"""A rank that dies, hangs or raises takes the others down in time, with one message that says which rank and where."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_runs
import torch.distributed as dist
from guilty_rank import act_in_step_3, die, refuse, spin, stop, stop_readers
from multirank import SERVER, run_ranks
from tiny_runs import tiny_recipe

from soar_mega import distributed, platform
from soar_mega.config import ParallelConfig, Recipe, TrainConfig
from soar_mega.distributed import start_world
from soar_mega.faults import watchdog
from soar_mega.faults.agreement import world
from soar_mega.faults.failure_report import failure_report
from soar_mega.faults.limits import (
    ANY_TIME,
    collective_timeout,
    ending_seconds,
    grace_seconds,
    last_resort_seconds,
    limit,
    poll_seconds,
)
from soar_mega.faults.roll_call import State
from soar_mega.faults.watchdog import is_lost_connection
from soar_mega.phases import Phases
from soar_mega.recipe import recipe_to_yaml
from soar_mega.stages import SoarConfig

TIMEOUT_MINUTES = 0.1


def _warnings(file: Path) -> logging.Handler:
    handler = logging.FileHandler(file)
    handler.setLevel(logging.WARNING)
    return handler


def one_rank(
    recipe: Recipe,
    rank: int,
    size: int,
    port: int,
    folder: Path,
    guilty: int,
    act: Callable[[], None],
    phase: str,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    platform.install()
    logging.getLogger("soar_mega").addHandler(_warnings(folder / f"log-{rank}"))
    if rank == guilty:
        act_in_step_3(act, phase)
    tiny_runs.run(recipe)


@dataclass
class End:
    codes: list[int | None]
    seconds: float  # from the failure to the end of the last of the others
    messages: list[str]  # of all ranks
    report: str
    stacks: dict[str, str]


def end_of(
    shards: Path,
    folder: Path,
    size: int,
    guilty: int,
    act: Callable[[], None],
    phase: str,
    iterations: int = 5,
    **layout: int,
) -> End:
    """What a run without a launcher comes to when one of its ranks acts after step 2; who is left then is killed."""
    settings = {f"parallel__{key}": value for key, value in layout.items()}
    settings |= {"data__num_workers": int(size == 1), "train__train_iters": iterations}
    recipe = tiny_recipe(shards, folder / "run", train__step_timeout_minutes=TIMEOUT_MINUTES, **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(recipe, rank, size, port, folder, guilty, act, phase) for rank in range(size)]
    ranks = [SERVER.Process(target=one_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    log = folder / "run" / "train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and " iteration        2/" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    began = time.monotonic()
    for rank, process in enumerate(ranks):
        if rank != guilty or size == 1:
            process.join(60)
    seconds = time.monotonic() - began
    ranks[guilty].join(10)  # it ends by itself, or never
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    logs = [folder / f"log-{rank}" for rank in range(size)]
    found = [file for file in folder.glob("run/failures/*/*") if file.suffix == ".txt"]
    texts = {file.name: file.read_text() for file in found}
    messages = [file.read_text() for file in logs if file.exists()]
    return End(codes, seconds, [m for m in messages if m], texts.pop("report.txt", ""), texts)


def test_a_rank_that_raises(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 2, 1, refuse, "data", tensor_model_parallel_size=2)
    assert end.codes == [1, 1] and end.seconds < 30
    (said,) = end.messages
    assert "rank 1 stops in step 3, phase data: rank 1 has had enough" in said
    assert "rank 1 has had enough" in end.report and "in refuse" in end.stacks["rank_00001.txt"]


def test_a_rank_that_is_killed(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 2, 1, die, "learn", pipeline_model_parallel_size=2)
    assert end.codes == [1, -signal.SIGKILL] and end.seconds < 30
    (said,) = end.messages
    assert "the run ends: a connection to another rank broke" in said
    assert re.search(r"\n  rank 1 \(process \d+ on \S+\) gives no sign of life: killed", said)
    assert "\n  rank 0 in step 3, phase learn, at " in said
    assert list(end.stacks) == ["rank_00000.txt"]


def test_the_rank_that_keeps_the_store_is_killed(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 2, 0, die, "data")
    assert end.codes == [-signal.SIGKILL, 1] and end.seconds < 30
    (said,) = end.messages
    assert "the store of the run does not answer: rank 0" in said


def test_a_rank_that_hangs(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 2, 1, spin, "learn")
    assert end.codes == [1, 1] and end.seconds < 45
    (said,) = end.messages
    assert "step 3 takes longer than 0.1 minutes (train.step_timeout_minutes)" in said
    blamed = r"\n  rank 1 \(process \d+ on \S+\) is in step 3, phase learn, at spin \(guilty_rank.py:\d+\)"
    assert re.search(blamed, said)
    assert re.search(r"\n  rank 0 in step 3, phase learn, at \w+ \(distributed_c10d.py:\d+\) for ", said)
    assert "in spin" in end.stacks["rank_00001.txt"] and "distributed_c10d" in end.stacks["rank_00000.txt"]


@pytest.mark.slow
def test_a_rank_that_hangs_in_the_export(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 2, 1, spin, "export", iterations=2)
    assert end.codes == [1, 1] and end.seconds < 45
    (said,) = end.messages
    assert "phase export after step 2 takes longer than 0.03 minutes (train.phase_timeout_minutes)" in said
    assert re.search(r"\n  rank 1 \(process \d+ on \S+\) is in step 2, phase export, at spin", said)
    assert "in spin" in end.stacks["rank_00001.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["measurements", "checkpoint"])
def test_a_rank_that_hangs_between_steps(shards: Path, tmp_path: Path, phase: str) -> None:
    end = end_of(shards, tmp_path, 1, 0, spin, phase)
    assert end.codes == [1] and end.seconds < 45
    assert f"phase {phase} after step 2 takes longer than 0.03 minutes" in end.report
    assert f"is in step 2, phase {phase}, at spin" in end.report


def warnings_of_a_run_with_a_slow_clock(folder: Path) -> tuple[list[str], list[str]]:
    """What is warned of while rank 1's clock is an hour behind, and when it says nothing any more."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("soar_mega").addHandler(handler)
    start_world(ParallelConfig())
    if dist.get_rank() == 1:
        real = time.time
        time.time = lambda: real() - 3600.0
    watchdog.SILENCE_SECONDS = 1.0
    with watchdog.Watchdog(folder, TrainConfig()) as watching:
        time.sleep(2.5)
        dist.barrier()
        while_it_spoke = list(messages)
        if dist.get_rank() == 1:
            watching._stopped.set()
        time.sleep(6.0)
        dist.barrier()
    return while_it_spoke, messages


@pytest.mark.slow
def test_silence_is_measured_on_one_clock(tmp_path: Path) -> None:
    (while_it_spoke, messages), others = run_ranks(warnings_of_a_run_with_a_slow_clock, 2, tmp_path)
    assert while_it_spoke == [] and others == ([], [])
    (said,) = messages
    assert re.search(r"^rank 1 \(process \d+ on \S+\) has given no sign of life for [3-9] s: last seen", said)


@pytest.mark.parametrize("world_size", [1, 8, 10_000])
@pytest.mark.parametrize("step", [0.1, 10.0, 60.0, None])
@pytest.mark.parametrize("phase", [0.1, 60.0, 600.0, None])
def test_no_collective_loses_patience_before_the_watchdog(
    step: float | None, phase: float | None, world_size: int
) -> None:
    train = TrainConfig(step_timeout_minutes=step, phase_timeout_minutes=phase)
    waits = collective_timeout(train, world_size).total_seconds()
    now = Phases()
    limits = [limit(train, now)]
    for number in range(1, 5):
        now.begin_step(number, "data")
        limits.append(limit(train, now))
        now.leave_step("checkpoint")
        limits.append(limit(train, now))
    allowed = [found.seconds / 60.0 for found in limits if found is not None]
    assert allowed == [
        minutes for minutes in [phase, *2 * [step and 3 * step, phase], *2 * [step, phase]] if minutes
    ]
    # a poll sees that time is up, or that the roll was called; then ranks answer, and all end
    poll, grace, ending = (f(world_size) for f in (poll_seconds, grace_seconds, ending_seconds))
    assert 1.0 <= poll < grace < ending - 1.0 and world_size / poll < 500
    assert all(last_resort_seconds(60.0 * minutes, world_size) > 60.0 * minutes + poll for minutes in allowed)
    watched = max((last_resort_seconds(60.0 * minutes, world_size) for minutes in allowed), default=0.0)
    assert waits > watched + ending
    if len(allowed) < len(limits):
        assert waits == ANY_TIME.total_seconds()
    else:
        assert waits <= watched + ending + 60.0


def test_a_run_s_world_waits_longer_than_its_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """All groups and the store, from which ranks take addresses at the first collective of a group."""
    started: list[timedelta] = []
    monkeypatch.setattr(distributed, "start_world", lambda *given: started.append(given[1]))
    monkeypatch.setattr(distributed, "stop_world", lambda: None)
    recipe = Recipe(stage=SoarConfig(), train=TrainConfig(step_timeout_minutes=50.0))
    with world(recipe):
        pass
    assert started == [collective_timeout(recipe.train, 1)] and started[0] > timedelta(minutes=150)


@pytest.mark.slow
def test_a_rank_that_is_stopped(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 2, 1, stop, "data")
    assert end.codes == [1, None] and end.seconds < 45
    (said,) = end.messages
    assert re.search(
        r"rank 1 \(process \d+ on \S+\) gives no sign of life.* Last seen at least \d+ s ago in step \d", said
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("refuse", "rank 2 stops in step 3, phase learn: rank 2 has had enough"),
        ("die", r"rank 2 \(process \d+ on \S+\) gives no sign of life: killed"),
        ("spin", r"rank 2 \(process \d+ on \S+\) is in step 3, phase learn, at spin"),
        ("stop", r"rank 2 \(process \d+ on \S+\) gives no sign of life"),
    ],
)
def test_under_torchrun_one_of_four_ranks_ends_all(
    shards: Path, tmp_path: Path, act: str, expected: str
) -> None:
    """Tensor and data parallel; the last stage is everywhere, so that the loss is."""
    layout = {"parallel__tensor_model_parallel_size": 2, "train__step_timeout_minutes": TIMEOUT_MINUTES}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_to_yaml(tiny_recipe(shards, tmp_path / "run", **layout)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    program = [str(Path(__file__).with_name("guilty_rank.py")), str(recipe), "2", act, "learn"]
    result = subprocess.run(
        [*launcher, *program], cwd=tiny_runs.ROOT, capture_output=True, text=True, timeout=150
    )
    assert result.returncode != 0
    said = result.stderr
    assert len(re.findall(r"(?m)^(\[rank \d\] rank 2 stops|  rank 2 \()", said)) == 1 and re.search(
        expected, said
    )
    left = subprocess.run(["pgrep", "-f", str(recipe)], capture_output=True, text=True).stdout
    assert not left


@pytest.mark.slow
def test_a_reader_process_that_hangs(shards: Path, tmp_path: Path) -> None:
    end = end_of(shards, tmp_path, 1, 0, stop_readers, "data")
    assert end.codes == [1] and end.seconds < 30
    (said,) = end.messages
    assert re.search(
        r"rank 0 \(process \d+ on \S+\) is in step \d, phase data, at .* for __next__ \(readers.py:", said
    )


def state(rank: int, number: int = 7, waits: bool = True, answers: bool = True, place: str = "wait") -> State:
    return State(
        rank=rank,
        host="node",
        pid=100 + rank,
        said=3,
        step=17,
        phase="learn" if number == 7 else "answer",
        number=number,
        seconds=63.0,
        place=place,
        waits=waits,
        answers=answers,
    )


def test_the_report_blames_who_is_behind() -> None:
    states = [state(rank) for rank in range(5)]
    states[2] = state(2, number=6, place="read")
    said = failure_report("step 17 takes long", states, {}).splitlines()
    assert said == [
        "the run ends: step 17 takes long",
        "  rank 2 (process 102 on node) is in step 17, phase answer, at read for 63 s; the others wait for it",
        "  ranks 0-1, 3-4 in step 17, phase learn, at wait",
    ]


def test_the_report_blames_nobody_without_a_reason() -> None:
    said = failure_report("step 17 takes long", [state(rank, waits=False) for rank in range(3)], {})
    assert "no rank is behind the others" in said and "ranks 0-2 in step 17" in said and "node" not in said


def test_the_report_of_many_ranks_is_short() -> None:
    states = [state(rank, answers=rank > 100) for rank in range(200)]
    said = failure_report("lost", states, dict.fromkeys(range(200), 63.4)).splitlines()
    assert len(said) == 11 and said[9] == "  and 93 more ranks like them"
    assert "Last seen at least 63 s ago in step 17, phase learn" in said[1]


def test_own_time_leaves_waiting_and_what_is_no_step_out() -> None:
    phases = Phases()
    phases.begin_step(1, "data")
    time.sleep(0.05)
    phases.enter("learn")
    with phases.waiting():
        assert phases.is_waiting
        time.sleep(0.2)
    phases.leave_step("checkpoint")
    time.sleep(0.05)
    phases.begin_step(2, "data")
    assert phases.step == 2 and phases.number == 4 and not phases.is_waiting
    taken = phases.take_seconds()
    assert set(taken) == {"data", "learn"} and 0.05 <= taken["data"] < 0.15 and taken["learn"] < 0.1
    assert phases.take_seconds() == {}


def test_which_errors_are_of_a_connection() -> None:
    gloo = RuntimeError(
        "[x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    )
    wrapped = OSError("this checkpoint could not be written")
    wrapped.__cause__ = gloo
    assert is_lost_connection(gloo) and is_lost_connection(wrapped)
    assert not is_lost_connection(RuntimeError("shapes do not match")) and not is_lost_connection(
        OSError("disk")
    )
