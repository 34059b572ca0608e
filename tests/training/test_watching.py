"""Ranks that watch a run's checkpoints stay together."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from multirank import run_ranks

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.training.watching import watch


def measure(model: Any) -> Any:
    raise ValueError("weights are missing")


def watched(folder: Path) -> list[Any]:
    """A checkpoint that cannot be read, which rank 0 no longer sees and rank 1 still does."""
    start_world(ParallelConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "iterations", lambda run: [1])
        patch.setattr(RunFolder, "complete", lambda run: {})
        if dist.get_rank() == 1:
            patch.setattr(RunFolder, "checkpoint", lambda run, iteration: folder)
        store = SimpleNamespace(names=lambda pattern: [], read_json=None)
        evaluation: Any = SimpleNamespace(store=store, measure=measure)
        return watch(evaluation, str(folder), [], model=lambda path: None)  # type: ignore[arg-type, return-value]


def test_a_checkpoint_is_gone_for_all_ranks_or_for_none(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    assert run_ranks(watched, 2, tmp_path, timeout=60) == [[], []]
