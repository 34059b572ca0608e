"""Runs of reinforcement learning: resumed at any point of a collection, stopped, refused; and rewards that rise."""

import json
import os
import pkgutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import torch.distributed as dist
from multirank import RankFailure, run_ranks
from PIL import Image
from rl_cases import STAGES, mean_red, rl_recipe, rl_steps, rl_words, taken
from safetensors.torch import load_file
from tiny_runs import held_out, logged, tiny_recipe
from torch import Tensor

from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.cli import main
from soar_mega.config import Recipe
from soar_mega.data.info import DataError
from soar_mega.distributed import start_world, stop_world
from soar_mega.faults.signals import StopRequest
from soar_mega.training.anomalies import worst_samples
from soar_mega.training.collection_report import best_median_worst, statistics
from soar_mega.training.collector import Collection
from soar_mega.training.experience import Share, order_of_pass
from soar_mega.training.loop import Steps
from soar_mega.training.run import Trainer

ITERATIONS = 6  # of collections that are learned from in 4
Finished = dict[str, tuple[Recipe, list[float], list[dict[str, Any]]]]


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


def saved_run(recipe: Recipe) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses and places of a run with a checkpoint after each step, also between a collection and the first one."""
    losses, places = [], []
    with rl_steps(recipe) as run:
        for _ in range(ITERATIONS):
            run.collect()
            if run.progress.iteration == 0:
                checkpoint(run)
            losses.append(run.learn()["loss"])
            run.update()
            places.append(run.collector.place.state_dict())
            checkpoint(run)
    return losses, places


def resumed(recipe: Recipe, iteration: int) -> tuple[list[float], list[dict[str, Any]]]:
    """The next losses and places of a run that goes on from the checkpoint of an iteration."""
    RunFolder(recipe.checkpoint.save).set_latest(iteration)
    with rl_steps(recipe) as run:
        assert run.progress.iteration == iteration
        assert run.collector is not None
        losses, places = [], []
        for _ in range(iteration, min(iteration + 2, ITERATIONS)):
            assert (run.collect() is not None) == (run.progress.iteration == 4)
            losses.append(run.learn()["loss"])
            run.update()
            places.append(run.collector.place.state_dict())
    return losses, places


OPTIONS: dict[str, dict[str, Any]] = {
    "flow_grpo": {
        "stage__old_log_probabilities": "replayed",
        "stage__rewards": "{'test_rl_runs:mostly_known#mean_red': 1.0}",
        "data__max_failed_share": 0.5,
    },
    "diffusion_nft": {"lora__rank": 4},
}


@pytest.fixture(scope="module")
def finished(folder: Path) -> Finished:
    """A run of each stage, with a checkpoint of every iteration, its losses and its places."""
    return {stage: finished_run(stage, folder) for stage in STAGES}


def finished_run(stage: str, folder: Path) -> tuple[Recipe, list[float], list[dict[str, Any]]]:
    recipe = rl_recipe(
        folder,
        stage,
        checkpoint__save=folder / stage,
        checkpoint__keep_last=0,
        checkpoint__async_save="false",
        **OPTIONS[stage],
    )
    return recipe, *saved_run(recipe)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_within_a_collection_it_is_the_same_run(stage: str, finished: Finished) -> None:
    """Bitwise, from before the first update, from between any two, and over the end of the collection."""
    recipe, losses, places = finished[stage]
    assert len(set(losses)) == ITERATIONS
    assert (places[-1]["not_judged"] > places[0]["not_judged"]) == (stage == "flow_grpo")
    for iteration in range(ITERATIONS):
        next_ones = slice(iteration, iteration + 2)
        assert resumed(recipe, iteration) == (losses[next_ones], places[next_ones]), iteration


def saved_within_a_collection(recipes: list[Recipe]) -> None:
    """A checkpoint of each after its first step."""
    for recipe in recipes:
        with rl_steps(recipe) as run:
            taken(run, 1)
            checkpoint(run)


def continued(recipes: list[Recipe]) -> list[list[float]]:
    """The losses of the steps that were left of a collection, and of the first one behind it."""
    found = []
    for recipe in recipes:
        with rl_steps(recipe) as run:
            assert run.progress.iteration == 1 and not run.collector.is_empty
            found.append(taken(run, 4)["losses"].tolist())
    return found


@pytest.mark.slow
def test_a_collection_is_learned_from_at_another_layout(
    finished: Finished, folder: Path, tmp_path: Path
) -> None:
    """Drawn by two replicas, learned from by two pipeline ranks."""

    def recipes(**layout: Any) -> list[Recipe]:
        return [
            rl_recipe(folder, stage, checkpoint__save=tmp_path / stage, **OPTIONS[stage], **layout)
            for stage in STAGES
        ]

    run_ranks(saved_within_a_collection, 2, recipes())
    for rank in run_ranks(continued, 2, recipes(parallel__pipeline_model_parallel_size=2)):
        for found, (_, losses, _) in zip(rank, finished.values(), strict=True):
            assert found == pytest.approx(losses[1:5], rel=1e-5, abs=1e-5 * max(map(abs, losses)))


def mostly_known(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """How red an image is, but for every seventh one or so."""
    red = mean_red(images, prompts, metadata)
    return {"mean_red": torch.where((red * 1e3).int() % 7 == 0, torch.nan, red)}


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
        data__max_failed_share=0.125,
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
        # each sample once, with its steps; those that count for nothing behind all others
        samples = worst_samples(run, None)
        assert sorted(sample.position for sample in samples) == list(range(32))
        assert [len(sample.points) for sample in samples] == [run.recipe.stage.trained_points] * 28 + [0] * 4
        assert all("red" in sample.name for sample in samples[28:])
        assert "could not be judged, left out of learning: 4 of 'a red 3'" in caplog.text
        assert run.loader.state_dict()["not_judged"] == 4
        recipe.data.max_failed_share = 0.124
    with (
        rl_steps(recipe) as run,
        pytest.raises(DataError, match=r"4 samples could not be judged, 12.50% .*'a red"),
    ):
        run.collect()


def nothing(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """A reward that always fails."""
    raise RuntimeError("out of paint")


@pytest.mark.slow
def test_a_reward_that_judges_nothing_ends_the_run_with_its_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = rl_words(
        folder, stage__rewards="{'test_rl_runs:nothing': 1.0}", checkpoint__save=tmp_path / "run"
    )
    assert main(["train", str(tiny_runs.ROOT / "recipes/tiny/flow_grpo.yaml"), *words]) == 1
    assert "reward nothing could not judge one of the 16 samples" in (told := capsys.readouterr().err)
    assert "RuntimeError: out of paint" in told


def test_a_broken_reward_ends_the_run(folder: Path) -> None:
    recipe = rl_recipe(folder, "diffusion_nft", stage__rewards="{'test_rl_runs:broken': 1.0}")
    with rl_steps(recipe) as run, pytest.raises(DataError, match="broken"):
        run.collect()


def test_prompts_that_cannot_be_judged_end_the_run_before_it_draws(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "foxes.txt"
    prompts.write_text("a 3\n\na fox\na 4\nan 8\na 5\n")
    for key in ("data__prompts", "data__validation_prompts"):
        settings = {key: prompts, "stage__rewards": "{digits: 1.0}", "logging__eval_interval": 1}
        with (
            pytest.raises(DataError, match=r"foxes\.txt:3: the prompt 'a fox' is none that digits can judge"),
            rl_steps(rl_recipe(folder, "flow_grpo", **settings)),
        ):
            pass


def test_a_run_that_is_stopped_while_it_draws_draws_the_same_again(folder: Path) -> None:
    with rl_steps(rl_recipe(folder, "flow_grpo")) as run:
        seen: list[int] = []
        assert run.collect(lambda drawn: seen.append(drawn) or drawn >= 6) is None
        assert seen == [3, 6] and run.collector.is_empty
        again = run.collect()
    with rl_steps(rl_recipe(folder, "flow_grpo")) as run:
        fresh = run.collect()
    assert torch.equal(again.rewards["total"], fresh.rewards["total"])


def test_a_run_that_is_stopped_behind_the_drawing_keeps_its_curves(folder: Path, tmp_path: Path) -> None:
    """The collection is told of once, by the start that drew it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = []
    recipe = rl_recipe(folder, "flow_grpo", checkpoint__save=tmp_path, logging__tensorboard="true")
    start_world(recipe.parallel)
    for drawn in (True, False):
        run = Trainer(recipe, RunFolder(tmp_path))
        assert run.collector is not None and run.collector.is_empty == drawn
        with StopRequest(None) as stop:
            run.draw(stop)
        if drawn:
            run.saved = -1  # as behind the first step: a run has no checkpoint of iteration 0
            run.save(wait=True)
        run.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        curve.append([(event.step, event.value) for event in events.Scalars("reward/total")])
    assert curve[0] == curve[1] and [step for step, _ in curve[0]] == [1]


def test_what_a_run_cannot_go_on_with_is_named(finished: Finished, folder: Path, tmp_path: Path) -> None:
    recipe, *_ = finished["flow_grpo"]
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
        ({"stage__eta": 0.3}, r"started with stage.eta=0.7, not 0.3: .*may change between two collections"),
        (
            {"stage__sampling_steps": 4, "stage__sigma_grid": "linear"},
            "sampling_steps=3, not 4, stage.sigma_grid",
        ),
        ({"data__resolution": 32}, "started with data.resolution=None, not 32"),
    ]:
        with (
            pytest.raises(ValueError, match=said),
            rl_steps(rl_recipe(folder, stage, **(settings | changed))),
        ):
            pass
    RunFolder(save).set_latest(4)  # between two collections
    with rl_steps(
        rl_recipe(folder, stage, **(settings | {"train__global_batch_size": 16, "stage__eta": 0.3}))
    ) as run:
        assert run.progress.iteration == 4
        taken(run, 1)


def test_the_old_policy_moves_when_a_collection_is_over_whatever_the_batch(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection that begins behind iteration 4 and has 8 updates ends at 12; iterations alone would say 8."""
    recipe, *_ = finished["diffusion_nft"]
    smaller = replace(recipe, train=replace(recipe.train, global_batch_size=4))
    RunFolder(recipe.checkpoint.save).set_latest(4)  # between two collections
    moved: list[int] = []
    with rl_steps(smaller) as run:
        monkeypatch.setattr(
            run.engine, "blend_weights", lambda name, decay: moved.append(run.progress.iteration)
        )
        for _ in range(9):
            run.collect()
            run.learn()
            run.update()
    assert moved == [12]


def test_each_pass_keeps_samples_with_their_replica() -> None:
    """Every sample once in each pass, in another company, and the same at any number of replicas."""
    whole = Share(updates=6, global_batch_size=4, replica=0, replicas=1)
    orders = [order_of_pass(7, 1000, whole, number) for number in range(3)]
    assert not torch.equal(orders[1], orders[2])
    for number, order in enumerate(orders):
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


def test_groups_of_which_nothing_was_judged_are_not_told_of_as_equal() -> None:
    """Two groups of two samples, by hand, and one that could not be judged."""
    total = torch.tensor([1.0, 4.0, torch.nan, 3.0, 4.0, torch.nan], dtype=torch.float64)
    found = Collection(
        number=0,
        prompt=torch.tensor([7, 8, 9]).repeat(2),
        rewards={"red": total, "only_looked_at": torch.full_like(total, torch.nan), "total": total},
        advantages=total,
        seconds=2.0,
    )
    told = statistics(found)
    assert (told["reward/std-within-groups"], told["reward/groups-without-variance"]) == (0.5, 0.5)
    assert (told["reward/total"], told["reward/samples-not-judged"]) == (3.0, 2)
    assert "reward/only_looked_at" not in told


DEATHS = {  # what is killed in the middle of: on one of two ranks, all of which go
    "drawing": ("soar_mega.training.collector.draw", 3),
    "judging": ("soar_mega.training.collector.rewards_of_all", 1),
    "learning": ("soar_mega.training.loop.Steps.learn", 4),
    "updating": ("soar_mega.training.loop.Steps.update", 6),
}


def run_and_die(recipe: Recipe, where: str, times: int) -> int:
    """Kill -9 of rank 1 at a call that comes for so many times."""
    calls = []
    act = pkgutil.resolve_name(where)

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(where)
        if len(calls) == times and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, dying)
        return tiny_runs.run(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_it_ends_as_if_nothing_had_been(
    stage: str, folder: Path, tmp_path: Path
) -> None:
    def recipe(name: str) -> Recipe:
        settings = {
            "checkpoint__save": tmp_path / name,
            "checkpoint__save_interval": 2,
            "train__train_iters": 7,
        }
        return rl_recipe(folder, stage, **settings, **OPTIONS[stage])

    assert run_ranks(tiny_runs.run, 2, recipe("undisturbed")) == [0, 0]
    expected = logged(tmp_path / "undisturbed")
    for name, (where, times) in DEATHS.items():
        with pytest.raises(RankFailure, match="died without a word"):
            run_ranks(run_and_die, 2, recipe(name), where, times)
        assert run_ranks(tiny_runs.run, 2, recipe(name)) == [0, 0], name
        assert logged(tmp_path / name) == expected, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_reward_that_is_known_rises(stage: str, folder: Path) -> None:
    """How red an image is, in a few updates: this tests the machinery, not the methods."""
    recipe = rl_recipe(
        folder,
        stage,
        stage__images_per_prompt=8,
        stage__updates_per_sample=1,
        stage__collect_micro_batch_size=32,
        stage__guidance_scale=1.0,
        stage__kl_beta=0,
        train__global_batch_size=32,
        train__micro_batch_size=32,
        train__points_per_micro_batch=32,
        optimizer__lr=1e-3,
    )
    with rl_steps(recipe) as run:
        rewards = taken(run, 7)["rewards"]
    before, after = rewards[0], rewards[-1]
    noise = (before.var() / len(before) + after.var() / len(after)).sqrt()
    assert after.mean() - before.mean() > 5 * noise


def test_a_whole_run_from_the_weights_of_soar(shards: Path, folder: Path, tmp_path: Path) -> None:
    """With all that is measured and written; the reference is what the run started from."""
    soar = tiny_recipe(shards, tmp_path / "soar", train__train_iters=1)
    assert tiny_runs.run(soar) == 0
    recipe = rl_recipe(
        folder,
        "flow_grpo",
        checkpoint__save=tmp_path / "run",
        checkpoint__load=tmp_path / "soar",
        checkpoint__finetune="true",
        checkpoint__export="true",
        train__train_iters=5,
        train__ema_decay=0.5,
        data__validation_prompts=folder / "prompts.txt",
        data__validation_path=shards,
        logging__tensorboard="true",
        logging__collection_interval=1,
        logging__eval_interval=5,
        logging__eval_samples=5,
        logging__sample_interval=5,
        logging__sample_prompts="[a red 3]",
        logging__sample_steps=2,
    )
    name = "context_embedder.weight"
    base = load_file(Path(recipe.model.pipeline_dir, "transformer/diffusion_pytorch_model.safetensors"))[name]
    with rl_steps(recipe) as run:
        reference = run.engine.tensors("reference")(name)
        assert torch.equal(reference, run.engine.tensors()(name)) and not torch.equal(reference, base)
    stop_world()
    assert tiny_runs.run(recipe) == 0
    facts = json.loads((tmp_path / "run/export/training_facts.json").read_text())
    assert [facts[key] for key in ("max_sequence_length", "width", "height")] == [10, 16, 16]  # the base's
    said = (tmp_path / "run/train.log").read_text()
    measured = held_out(tmp_path / "run")
    assert len(measured) == 2 and all(0 < line["validation/reward/mean_red"] < 1 for line in measured)
    assert all("validation/loss" in line for line in measured)
    for collection, iteration in ((0, 1), (1, 5)):
        assert said.count(f" collection {collection} for iteration {iteration} | reward/total: ") == 1
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"collections", "samples", "tensorboard", "export", "export_ema", "complete.json"} <= left
    sheet = Image.open(tmp_path / "run/collections/iter_0000005.png")
    assert sheet.size == (4 * 98 + 2, 3 * 98 + 2)
