"""Strict loading: what a checkpoint lacks, has too much or has in another shape is told before anything is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import MODEL, Weights, load, progress, save

from soar_mega import distributed
from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.checkpoints.resume import resume
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.checkpoints.strict import differences
from soar_mega.config import CheckpointConfig, ParallelConfig


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    distributed.start_world(ParallelConfig())
    yield
    distributed.stop_world()


def test_differences_are_listed_by_group_and_name() -> None:
    saved = {
        "a.weight": (4, 2),
        "a.bias": (4,),
        "b": (1,),
        "a._extra_state": None,
        "optimizer.state.param.b": (1,),
    }
    saved |= {"weights.ema.a": (3,), "weights.reference.a": (3,)}
    assert differences(saved, {"a.weight": (4, 2), "a.bias": (4,), "b": (1,)}) == []
    wanted = {
        "a.weight": (2, 4),
        "a.bias": (4,),
        "c": (7,),
        "optimizer.state.param.c": (7,),
        "weights.ema.a": (3,),
    }
    assert differences(saved, wanted) == [
        "main copies of the weights: 1 missing: optimizer.state.param.c",
        "main copies of the weights: 1 not wanted: optimizer.state.param.b",
        "model: 1 missing: c",
        "model: 1 not wanted: b",
        "model: 1 of another shape: a.weight (4 x 2 there, 2 x 4 here)",
    ]
    assert differences(saved, {"weights.reference.a": (3,)}) == []
    many: dict[str, Any] = {f"layers.{i:02}": (1,) for i in range(30)}
    assert differences({}, many) == [
        f"model: 30 missing: {', '.join(f'layers.{i:02}' for i in range(20))}, and 10 more"
    ]


@pytest.mark.parametrize("finetune", [False, True])
def test_a_checkpoint_of_other_tensors_is_refused_and_nothing_is_loaded(
    tmp_path: Path, finetune: bool
) -> None:
    save(RunFolder(tmp_path / "source"), 1, size=5)
    engine = Weights()
    with pytest.raises(ValueError) as failure:
        load_into(engine, tmp_path, finetune)
    said = str(failure.value)
    assert f"{tmp_path}/source/iter_0000001 does not hold what this run consists of" in said
    assert "model: 1 of another shape: current (5 there, 4 here)" in said
    assert ("weights.ema: 1 of another shape: weights.ema (5 there, 4 here)" in said) != finetune
    assert engine.current.tolist() == [0.0] * 4 and engine.ema.tolist() == [100.0] * 4


def load_into(engine: Weights, tmp_path: Path, finetune: bool) -> None:
    config = CheckpointConfig(load=str(tmp_path / "source"), finetune=finetune)
    resume(RunFolder(tmp_path / "own"), config, engine, MODEL)


def test_kept_weights_that_only_one_of_the_two_has_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    plain = Weights(1.0)
    plain.weights = {}
    Saver(run, CheckpointConfig(async_save=False), MODEL).save(plain, progress(1))
    with pytest.raises(ValueError, match=r"iter_0000001: holds no ema weights, which this recipe keeps"):
        load(run)
    with pytest.raises(ValueError, match=r"checkpoint.load_ema: .*iter_0000001 holds no EMA weights"):
        load(RunFolder(tmp_path / "own"), load=str(tmp_path), finetune=True, load_ema=True)
    save(run, 2)
    plain.current = torch.zeros(4)
    with pytest.raises(ValueError, match=r"iter_0000002: holds ema weights, which this recipe does not keep"):
        resume(run, CheckpointConfig(), plain, MODEL)
