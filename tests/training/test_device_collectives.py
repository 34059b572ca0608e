"""megatron's groups have NCCL alone on GPUs: a run does no collective of tensors on the CPU on them."""

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import torch.distributed as dist
from gpu_stand_in import nccl_alone
from multirank import RankFailure, run_ranks
from tiny_runs import tiny_recipe

from soar_mega.config import ParallelConfig, Recipe
from soar_mega.distributed import device, new_group, start_world


def run(recipe: Recipe) -> set[str]:
    """The groups that had collectives in a run."""
    with nccl_alone() as seen:
        assert tiny_runs.run(recipe) == 0
    return seen.groups


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"engine": "deepspeed", "zero_stage": 3, "tensor_model_parallel_size": 2},
    ],
    ids=["megatron", "deepspeed"],
)
def test_a_run_with_nccl_alone(shards: Path, tmp_path: Path, parallel: dict[str, Any]) -> None:
    """It trains and saves; resumes, trains and exports."""
    size = parallel["tensor_model_parallel_size"] * parallel.get("pipeline_model_parallel_size", 1)
    settings = {f"parallel__{key}": value for key, value in parallel.items()}
    settings |= {"train__global_batch_size": 8, "train__ema_decay": 0.5}
    run_ranks(run, size, tiny_recipe(shards, tmp_path / "run", train__train_iters=1, **settings))
    settings |= {"train__train_iters": 2, "checkpoint__export": "true"}
    groups = run_ranks(run, size, tiny_recipe(shards, tmp_path / "run", **settings))[0]
    assert {"TENSOR_MODEL_PARALLEL_GROUP", "PIPELINE_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP"} <= groups
    assert (tmp_path / "run" / "export_ema" / "transformer").is_dir()


def reduce_on(place: str) -> None:
    start_world(ParallelConfig())
    group = new_group([0])
    with nccl_alone():
        made = torch.ones(2, device=device())
        tensor = {"made": made, "made on the CPU": torch.ones(2), "brought": made.cpu() + 1}[place]
        dist.all_reduce(tensor)
        dist.all_reduce(tensor.to(device()), group=group)
        dist.all_reduce(tensor, group=group)


def test_the_stand_in_refuses() -> None:
    run_ranks(reduce_on, 1, "made")
    for place in ("made on the CPU", "brought"):
        with pytest.raises(RankFailure, match="No backend type associated with device type cpu"):
            run_ranks(reduce_on, 1, place)
