"""Runs of reinforcement learning: resumed at any point of a collection, stopped, refused; and rewards that rise."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from multirank import run_ranks
from rl_cases import STAGES, rl_recipe, rl_steps, taken
from torch import Tensor

from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.data.info import DataError
from soar_mega.distributed import stop_world
from soar_mega.training.collection_report import best_median_worst
from soar_mega.training.experience import Share, order_of_pass
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
            if run.progress.iteration == 0:
                checkpoint(run)
            losses.append(run.learn()["loss"])
            run.update()
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
            assert (run.collect() is not None) == (run.progress.iteration == 4)
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


def saved_within_a_collection(recipe: Recipe) -> None:
    with rl_steps(recipe) as run:
        taken(run, 1)
        checkpoint(run)


def continued(recipe: Recipe) -> list[float]:
    """The losses of the steps that were left of a collection, and of the first one behind it."""
    with rl_steps(recipe) as run:
        assert run.progress.iteration == 1 and not run.collector.is_empty
        return taken(run, 4)["losses"].tolist()


def test_a_collection_is_learned_from_at_another_layout(
    finished: tuple[Recipe, list[float]], folder: Path, tmp_path: Path
) -> None:
    """Drawn by two replicas, learned from by two pipeline ranks."""
    recipe, losses = finished
    stage = recipe.stage.name
    settings = {"checkpoint__save": tmp_path / "run", **OPTIONS[stage]}
    run_ranks(saved_within_a_collection, 2, rl_recipe(folder, stage, **settings))
    pipeline = rl_recipe(folder, stage, parallel__pipeline_model_parallel_size=2, **settings)
    for found in run_ranks(continued, 2, pipeline):
        assert found == pytest.approx(losses[1:5], rel=1e-5, abs=1e-5 * max(map(abs, losses)))


def not_red(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """A reward that cannot judge some prompts."""
    values = images.flatten(1).mean(dim=1)
    return torch.where(torch.tensor(["red" in prompt for prompt in prompts]), torch.nan, values)


def broken(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    """A reward that is one value short."""
    return [0.0] * (len(images) - 1)


def test_samples_that_cannot_be_judged_count_for_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = rl_recipe(
        folder,
        "flow_grpo",
        stage__rewards="{'test_rl_runs:not_red': 1.0}",
        stage__prompts_per_collection=8,
        train__global_batch_size=32,
    )
    with rl_steps(recipe) as run:
        collection = run.collect()
        assert collection is not None and run.collector is not None
        red = torch.tensor([run.collector.prompts.prompts[i] == "a red 3" for i in collection.prompt])
        assert red.sum() == 4 and torch.equal(collection.rewards["total"].isnan(), red)
        assert torch.equal(collection.advantages.isnan(), red)
        statistics = run.learn()
        assert statistics["loss"] == statistics["loss"]  # a number
        assert torch.equal(run.batch.valid, ~red[run.batch.position])
    assert "could not judge" in caplog.text


def test_a_broken_reward_ends_the_run(folder: Path) -> None:
    recipe = rl_recipe(folder, "diffusion_nft", stage__rewards="{'test_rl_runs:broken': 1.0}")
    with rl_steps(recipe) as run, pytest.raises(DataError, match="broken"):
        run.collect()


def test_a_run_that_is_stopped_while_it_draws_draws_the_same_again(folder: Path) -> None:
    with rl_steps(rl_recipe(folder, "flow_grpo")) as run:
        seen: list[int] = []
        assert run.collect(lambda drawn: seen.append(drawn) or drawn >= 6) is None
        assert seen == [3, 6] and run.collector.is_empty
        again = run.collect()
    with rl_steps(rl_recipe(folder, "flow_grpo")) as run:
        fresh = run.collect()
    assert torch.equal(again.rewards["total"], fresh.rewards["total"])


def test_what_a_run_cannot_go_on_with_is_named(
    finished: tuple[Recipe, list[float]], folder: Path, tmp_path: Path
) -> None:
    recipe, _ = finished
    stage, save = recipe.stage.name, recipe.checkpoint.save
    settings = OPTIONS[stage] | {"checkpoint__save": save}
    RunFolder(save).set_latest(2)
    others = tmp_path / "others.txt"
    others.write_text("a red 3\na blue 3\na 2\na 1\n")
    for changed, said in [
        ({"data__prompts": others}, "others.txt holds other prompts than the run was started with"),
        ({"stage__images_per_prompt": 6}, "started with stage.images_per_prompt=4, not 6"),
        ({"train__global_batch_size": 16}, "started with train.global_batch_size=8, not 16"),
        ({"train__seed": 1}, "started with train.seed=42, not 1"),
    ]:
        with (
            pytest.raises(ValueError, match=said),
            rl_steps(rl_recipe(folder, stage, **(settings | changed))),
        ):
            pass
    RunFolder(save).set_latest(4)  # between two collections
    with rl_steps(rl_recipe(folder, stage, **(settings | {"train__global_batch_size": 16}))) as run:
        assert run.progress.iteration == 4
        taken(run, 1)


def test_each_pass_keeps_samples_with_their_replica() -> None:
    """Every sample once in each pass, in another company, and the same at any number of replicas."""
    whole = Share(updates=6, global_batch_size=4, replica=0, replicas=1)
    for number in range(3):
        order = order_of_pass(7, 1000, whole, number)
        assert torch.equal(order.sort(dim=0).values, torch.arange(6)[:, None].expand(-1, 4))
        halves = [
            order_of_pass(7, 1000, Share(updates=6, global_batch_size=4, replica=r, replicas=2), number)
            for r in range(2)
        ]
        assert torch.equal(torch.cat(halves, dim=1), order)
        if number:
            assert (order[:, :-1] != order[:, 1:]).any() and not torch.equal(
                order, order_of_pass(7, 1024, whole, number)
            )


def test_the_pictures_of_a_collection() -> None:
    advantages = torch.tensor([0.5, torch.nan, -2.0, 3.0, 0.0, 1.0, -1.0, 0.2])
    assert best_median_worst(advantages).tolist() == [3, 5, 0, 7, 6, 2]
    assert best_median_worst(torch.tensor([torch.nan, 1.0])).tolist() == [1, 1, 1]
