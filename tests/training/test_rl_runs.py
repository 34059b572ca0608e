"""Runs of reinforcement learning: resumed at any point of a collection, stopped, refused; and rewards that rise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rl_cases import STAGES, rl_recipe, rl_steps

from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.distributed import stop_world
from soar_mega.training.loop import Steps

ITERATIONS = 6  # of collections that are learned from in 4


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    yield
    stop_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the prompts of all runs and their embeddings."""
    return tmp_path_factory.mktemp("rl")


def checkpoint(run: Steps) -> None:
    """As a run writes it."""
    folder = RunFolder(run.recipe.checkpoint.save)
    folder.path.mkdir(exist_ok=True)
    run.progress.loader = run.loader.state_dict()
    assert run.collector is not None
    saver = Saver(folder, run.recipe.checkpoint, run.sizes)
    saver.save(run.engine, run.progress, run.collector.pieces())
    saver.finish()


def saved_run(recipe: Recipe) -> list[float]:
    """The losses of a run with a checkpoint after each step, also between a collection and the first one."""
    losses = []
    with rl_steps(recipe) as run:
        for _ in range(ITERATIONS):
            run.collect()
            if run.progress.iteration in (0, 4):
                checkpoint(run)
            losses.append(run.learn()["loss"])
            run.update()
            if run.progress.iteration != 4:
                checkpoint(run)
    return losses


def resumed_losses(recipe: Recipe, iteration: int) -> list[float]:
    """The losses of a run that goes on from the checkpoint of an iteration."""
    RunFolder(recipe.checkpoint.save).set_latest(iteration)
    with rl_steps(recipe) as run:
        assert run.progress.iteration == iteration
        assert run.collector is not None
        found = []
        for _ in range(iteration, ITERATIONS):
            assert (run.collect() is None) == (
                run.progress.iteration % 4 != 0 or run.progress.iteration == iteration
            )
            found.append(run.learn()["loss"])
            run.update()
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"stage__old_log_probabilities": "replayed"},
    "diffusion_nft": {"lora__rank": 4},
}


@pytest.fixture(scope="module", params=STAGES)
def finished(request: pytest.FixtureRequest, folder: Path) -> tuple[Recipe, list[float]]:
    """A run of each stage, with a checkpoint of every iteration, and its losses."""
    recipe = rl_recipe(
        folder,
        request.param,
        checkpoint__save=folder / request.param,
        checkpoint__keep_last=0,
        checkpoint__async_save="false",
        **OPTIONS[request.param],
    )
    return recipe, saved_run(recipe)


def test_resumed_within_a_collection_it_is_the_same_run(finished: tuple[Recipe, list[float]]) -> None:
    """Bitwise, from before the first update, from between any two, and over the end of the collection."""
    recipe, losses = finished
    assert len(set(losses)) == ITERATIONS
    for iteration in range(ITERATIONS):
        assert resumed_losses(recipe, iteration) == losses[iteration:], iteration
