"""What tests/gpu does with whole runs on a GPU, done on the CPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import road


@pytest.mark.slow
def test_killed_resumed_exported_drawn_from_measured_and_converted(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "verbs").mkdir()
    road.verbs_on(road.killed_and_resumed(road.CASES[0], shards, tmp_path), shards, tmp_path / "verbs")


@pytest.mark.slow
@pytest.mark.parametrize("case", road.CASES[1:], ids=str)
def test_killed_and_resumed(case: road.Case, shards: Path, tmp_path: Path) -> None:
    road.killed_and_resumed(case, shards, tmp_path)


@pytest.mark.slow
def test_both_engines_start_alike(shards: Path, tmp_path: Path) -> None:
    losses = []
    for engine in ("megatron", "deepspeed"):
        (tmp_path / engine).mkdir()
        losses.append(road.first_losses(shards, tmp_path / engine, engine, on_cpu=True))
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-5)
