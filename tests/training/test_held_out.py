"""Held-out measurements of several processes: those of one, at every engine and however the samples divide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from multirank import run_ranks
from rl_cases import rl_recipe
from tiny_runs import make_shards, tiny_recipe

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.data.shards import open_shards
from soar_mega.distributed import start_world
from soar_mega.training.collector_inputs import held_out_prompts
from soar_mega.training.loop import Steps, make_loader
from soar_mega.training.validation import HeldOut

ONE, THREE = 3, 10  # samples: in batches of 4 of one shape, one batch, and three of which the last is short
OVERLAP = {"overlap_grad_reduce": "true", "overlap_param_gather": "true"}
PIPELINE = {"pipeline_model_parallel_size": 2}
WORLDS: dict[str, tuple[int, list[dict[str, Any]]]] = {  # processes, and the settings that are tried in turn
    "megatron": (2, [{"use_distributed_optimizer": "false"}, {}, OVERLAP]),
    "pipeline": (4, [PIPELINE, PIPELINE | OVERLAP]),
    "interleaved": (4, [PIPELINE | OVERLAP | {"virtual_pipeline_model_parallel_size": 2}]),
    "deepspeed": (2, [{"engine": "deepspeed", "zero_stage": stage} for stage in range(4)]),
}


def measure(recipe: Recipe) -> list[dict[str, float]]:
    """Loss and drift before a step, and after it by the weights of now and by their average."""
    start_world(recipe.parallel)
    steps = Steps(recipe, RunFolder(recipe.checkpoint.save), make_loader(recipe))
    shards, logging = open_shards(recipe.data.validation_path), recipe.logging

    def take(weights: str, of_loss: int, of_drift: int) -> dict[str, float]:
        held_out = HeldOut(shards, steps.stage.schedule, recipe.train.micro_batch_size, weights)
        settings = replace(logging, drift_samples=of_drift)
        return held_out.loss(steps.engine, of_loss) | held_out.drift(steps.engine, settings)

    before = take("current", THREE, ONE)
    steps.learn()
    steps.update()
    # the first forward after a step may be the one that gathers its parameters
    return [before, take("current", ONE, THREE), take("ema", THREE, ONE)]


def measure_each(recipes: list[Recipe]) -> list[list[dict[str, float]]]:
    return [measure(recipe) for recipe in recipes]


def recipe_of(shards: Path, parallel: dict[str, Any]) -> Recipe:
    settings = {f"parallel__{key}": value for key, value in parallel.items()}
    return tiny_recipe(
        shards,
        shards.parent / "never made",
        data__validation_path=shards,
        train__global_batch_size=8,
        train__ema_decay=0.5,
        logging__drift_spans="[[0.9, 0.65]]",
        logging__drift_steps=1,
        **settings,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", 12, seed=1, square=4)


@pytest.fixture(scope="module")
def expected(made: Path) -> list[dict[str, float]]:
    [found] = run_ranks(measure, 1, recipe_of(made, {}))
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "deepspeed" else name for name in WORLDS]
)
def test_measurements_are_those_of_one_process(
    name: str, made: Path, expected: list[dict[str, float]]
) -> None:
    processes, settings = WORLDS[name]
    for rank in run_ranks(measure_each, processes, [recipe_of(made, one) for one in settings]):
        for setting, found in zip(settings, rank, strict=True):
            for here, there in zip(found, expected, strict=True):
                assert here == pytest.approx(there, rel=1e-5), setting


def test_prompts_are_taken_from_all_of_their_file(tmp_path: Path) -> None:
    """Those of GenEval have one kind after the other."""
    file = tmp_path / "test_metadata.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "tag": {i}}}\n' for i in range(10)))
    settings = {"data__validation_prompts": file, "logging__eval_interval": 5, "logging__eval_samples": 3}
    found = held_out_prompts(rl_recipe(tmp_path, "flow_grpo", **settings))
    assert found is not None and found.prompts == ["p0", "p3", "p6"]
    assert [each["tag"] for each in found.metadata] == [0, 3, 6] and found.places == [[1], [4], [7]]
