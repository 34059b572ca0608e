"""A run that changes its engine at every start is the run that never did."""

from pathlib import Path

import pytest
import tiny_runs
import torch
from multirank import run_ranks
from safetensors.torch import load_file
from tiny_runs import logged, make_shards, tiny_recipe

from soar_mega.checkpoints.exchange import checkpoint_to_folder

ZERO_3 = {"parallel__engine": "deepspeed", "parallel__zero_stage": 3}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.slow  # test_deepspeed.py has engines go on from each other without a run
def test_a_run_goes_on_with_another_engine(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", 48, seed=1)
    for folder, starts in (("whole", [(1, 4, {})]), ("turns", [(2, 2, ZERO_3), (1, 3, {}), (2, 4, ZERO_3)])):
        for processes, iterations, engine in starts:
            recipe = tiny_recipe(
                shards,
                tmp_path / folder,
                train__train_iters=iterations,
                train__ema_decay=0.5,
                checkpoint__export="true",
                **engine,
            )
            assert run_ranks(tiny_runs.run, processes, recipe) == [0] * processes
    expected, found = logged(tmp_path / "whole"), logged(tmp_path / "turns")
    assert list(found) == [1, 2, 3, 4]
    for iteration, numbers in expected.items():
        assert found[iteration] == pytest.approx(numbers, rel=1e-5)
    for export in ("export", "export_ema"):
        whole, turns = (load_file(tmp_path / folder / export / WEIGHTS) for folder in ("whole", "turns"))
        assert whole.keys() == turns.keys()
        assert max((whole[key] - turns[key]).abs().mean().item() for key in whole) < 1e-6
    assert run_ranks(checkpoint_to_folder, 1, tmp_path / "turns", tmp_path / "converted") == [True]
    converted, exported = (load_file(tmp_path / name / WEIGHTS) for name in ("converted", "turns/export"))
    assert all(torch.equal(converted[key], exported[key]) for key in exported)
