"""The tiny recipe on a GPU as a user runs it: the CPU's losses, kill -9 and resume, the verbs on what comes out.

Runs that do not need each other go on side by side: most of a short run is starting Python.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import road
from tiny_runs import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "train", 48, seed=1)


@pytest.fixture(scope="module")
def started(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """Everything that the tests below wait for."""
    places = {"cpu": ("megatron", True), "megatron": ("megatron", False), "deepspeed": ("deepspeed", False)}
    with ThreadPoolExecutor(max_workers=len(places) + len(road.CASES)) as pool:
        futures: dict[str, Future] = {
            name: pool.submit(road.first_losses, shards, tmp_path_factory.mktemp(name), engine, on_cpu)
            for name, (engine, on_cpu) in places.items()
        }
        for case in road.CASES:
            folder = tmp_path_factory.mktemp(str(case))
            futures[str(case)] = pool.submit(road.killed_and_resumed, case, shards, folder)
        yield futures


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_five_steps_equal_those_on_the_cpu(engine: str, started: dict[str, Future]) -> None:
    expected, found = started["cpu"].result(), started[engine].result()
    assert len(expected) == 5 and found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", road.CASES, ids=str)
def test_a_killed_run_goes_on_as_if_nothing_had_been(case: road.Case, started: dict[str, Future]) -> None:
    assert (started[str(case)].result() / "export_ema").is_dir()


def test_verbs_on_the_result_do_what_they_do_on_the_cpu(
    shards: Path, started: dict[str, Future], tmp_path: Path
) -> None:
    road.verbs_on(started[str(road.CASES[0])].result(), shards, tmp_path)
