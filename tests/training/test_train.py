"""Runs on real processes: resuming, stopping, skipping, refusing."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from golden import assert_golden
from multirank import RankFailure, run_ranks
from safetensors.torch import load_file
from tiny_runs import ROOT, held_out, logged, tiny_recipe

from soar_mega import distributed
from soar_mega.checkpoints.rank_file import RankFile
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import ParallelConfig, Recipe
from soar_mega.data.order import Order, Place
from soar_mega.training.run import Trainer


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten uninterrupted iterations on one process, with held-out measurements at 0, 5 and 10."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_ranks(tiny_runs.run, 1, measured(shards, folder, train__train_iters=10)) == [0]
    return folder


@pytest.fixture
def world() -> Iterator[None]:
    distributed.start_world(ParallelConfig())
    yield
    distributed.stop_world()


def before_step(act: Callable[[Trainer], None]) -> None:
    """Calls `act` before each step of a run in this process."""
    step = Trainer.step

    def with_act(self: Trainer) -> float:
        act(self)
        return step(self)

    Trainer.step = with_act  # type: ignore[method-assign]


def run_and_die(recipe: Recipe, iteration: int) -> int:
    """Kill -9 in the middle of the run, after `iteration` steps."""

    def die(trainer: Trainer) -> None:
        if trainer.progress.iteration == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(die)
    return tiny_runs.run(recipe)


def run_and_ask(recipe: Recipe, iteration: int) -> int:
    """SIGTERM during step `iteration`."""

    def ask(trainer: Trainer) -> None:
        if trainer.progress.iteration == iteration - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before_step(ask)
    return tiny_runs.run(recipe)


def run_with_bad_steps(recipe: Recipe, bad: list[int]) -> str:
    """The loss of the given steps is not a number; returns what the run said in the end."""

    def spoil(trainer: Trainer) -> None:
        good = type(trainer.stage).loss
        if trainer.progress.iteration in bad:
            trainer.stage.loss = lambda points, velocity: good(trainer.stage, points, velocity) * float("nan")
        else:
            trainer.stage.loss = lambda points, velocity: good(trainer.stage, points, velocity)

    before_step(spoil)
    try:
        return str(tiny_runs.run(recipe))
    except ValueError as error:
        return str(error)


def refusal(recipe: Recipe) -> str:
    """What a run that does not start says."""
    with pytest.raises((ValueError, OSError)) as failure:
        tiny_runs.run(recipe)
    return str(failure.value)


def assert_equal_checkpoints(one: Path, two: Path) -> None:
    first, second = tiny_runs.tensors(one), tiny_runs.tensors(two)
    assert first.keys() == second.keys()
    assert any("exp_avg" in key for key in first) and any("weights.ema" in key for key in first)
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at iteration 7, with a checkpoint at 5."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = tiny_recipe(shards, folder, train__train_iters=10, checkpoint__save_interval=5)
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(run_and_die, 1, recipe, 7)
    assert not (folder / "complete.json").exists()
    return folder


def test_five_and_kill_and_five_is_bitwise_ten(
    shards: Path, reference: Path, killed: Path, tmp_path: Path, world: None
) -> None:
    folder = copied(killed, tmp_path)
    assert run_ranks(tiny_runs.run, 1, tiny_recipe(shards, folder, train__train_iters=10)) == [0]
    assert_equal_checkpoints(reference / "iter_0000010", folder / "iter_0000010")
    said = [json.loads((f / "iter_0000010" / "checkpoint.json").read_text()) for f in (reference, folder)]
    assert said[0] == said[1] and said[0]["consumed_samples"] == 160
    assert logged(folder) == logged(reference)


def test_resumed_at_another_layout(shards: Path, reference: Path, killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path)
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}
    assert (
        run_ranks(tiny_runs.run, 4, tiny_recipe(shards, folder, train__train_iters=10, **layout)) == [0] * 4
    )
    resumed, whole = logged(folder), logged(reference)
    for iteration in range(6, 11):
        assert resumed[iteration] == pytest.approx(whole[iteration], rel=1e-5)


def test_resumed_with_another_batch_size(shards: Path, reference: Path, killed: Path, tmp_path: Path) -> None:
    """Two steps of half the size, between which nothing moves, see the samples and the noise of the whole one."""
    folder = copied(killed, tmp_path)
    halves = {"train__global_batch_size": 8, "train__train_iters": 7, "optimizer__lr": 0.0}
    assert run_ranks(tiny_runs.run, 2, tiny_recipe(shards, folder, **halves)) == [0] * 2
    first, second = (logged(folder)[iteration][0] for iteration in (6, 7))
    assert (first + second) / 2 == pytest.approx(logged(reference)[6][0], rel=1e-5)
    said = json.loads((folder / "iter_0000007" / "checkpoint.json").read_text())
    assert said["consumed_samples"] == 96 and said["loader"]["buckets"] == {"16x16": 96}


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target / "run")
    return target / "run"


def test_sigterm_saves_and_asks_to_be_started_again(
    shards: Path, reference: Path, tmp_path: Path, world: None
) -> None:
    recipe = tiny_recipe(shards, tmp_path, train__train_iters=10)
    assert run_ranks(run_and_ask, 2, recipe, 3) == [75, 75]
    assert RunFolder(tmp_path).latest() == 3 and RunFolder(tmp_path).complete() is None
    assert list(logged(tmp_path)) == [1, 2, 3]
    late = tiny_recipe(shards, tmp_path, train__train_iters=10, train__exit_duration_in_mins=1e-9)
    assert run_ranks(tiny_runs.run, 1, late) == [75]
    assert run_ranks(tiny_runs.run, 1, recipe) == [0]
    marker = {"iteration": 10, "consumed_samples": 160, "exported": False}
    assert RunFolder(tmp_path).complete() == marker
    for iteration, values in logged(reference).items():
        assert logged(tmp_path)[iteration] == pytest.approx(values, rel=1e-5)
    before = (tmp_path / "iter_0000010").stat().st_mtime_ns
    assert run_ranks(tiny_runs.run, 1, recipe) == [0]
    log = (tmp_path / "train.log").read_text()
    assert "is complete (10 iterations): nothing to do" in log
    assert "it ran with another recipe" not in log
    assert re.search(r"memory of a rank .* \| [\d.]+ MiB: weights [\d.]+ MiB, gradients .*, kept ", log)
    assert (tmp_path / "iter_0000010").stat().st_mtime_ns == before


def test_bad_steps_are_skipped_and_counted_and_at_last_stop_the_run(
    shards: Path, tmp_path: Path, world: None
) -> None:
    once = tiny_recipe(shards, tmp_path / "once", train__train_iters=3, train__max_skipped_steps=2)
    assert run_ranks(run_with_bad_steps, 1, once, [1]) == ["0"]
    log = (tmp_path / "once" / "train.log").read_text()
    assert log.count("number of skipped iterations:   1 | number of nan iterations:   1 |") == 1
    assert list(logged(tmp_path / "once")) == [1, 3]
    assert (
        json.loads((tmp_path / "once" / "iter_0000003" / "checkpoint.json").read_text())["skipped_steps"] == 1
    )

    forever = tiny_recipe(
        shards,
        tmp_path / "ever",
        train__train_iters=9,
        train__max_skipped_steps=2,
        checkpoint__save_interval=1,
    )
    said = run_ranks(run_with_bad_steps, 1, forever, [1, 2, 3, 4, 5])[0]
    assert said.startswith(
        "2 steps in a row were skipped (train.max_skipped_steps), the last one with loss nan"
    )
    assert RunFolder(tmp_path / "ever").latest() == 3 and RunFolder(tmp_path / "ever").complete() is None
    first, last = (tiny_runs.tensors(tmp_path / "ever" / f"iter_000000{i}") for i in (2, 3))
    weights = [key for key in first if isinstance(first[key], torch.Tensor)]
    assert all(torch.equal(first[key], last[key]) and last[key].isfinite().all() for key in weights)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_run_that_is_bad_from_its_first_step_is_saved(
    shards: Path, tmp_path: Path, distributed_optimizer: bool
) -> None:
    """Adam has no moments before the first good step. The run stops for what it is, or goes on, or is resumed."""
    settings: dict[str, Any] = {
        "train__max_skipped_steps": 2,
        "checkpoint__save_interval": 1,
        "parallel__use_distributed_optimizer": distributed_optimizer,
    }
    ever = tiny_recipe(shards, tmp_path / "ever", train__train_iters=9, **settings)
    said = run_ranks(run_with_bad_steps, 1, ever, [0, 1, 2])[0]
    assert said.startswith("2 steps in a row were skipped") and "lower optimizer.lr" in said
    assert RunFolder(tmp_path / "ever").latest() == 2
    once = tiny_recipe(shards, tmp_path / "once", train__train_iters=3, **settings)
    assert run_ranks(run_with_bad_steps, 1, once, [0]) == ["0"]
    mended = tiny_recipe(shards, tmp_path / "ever", train__train_iters=3, **settings)
    assert run_ranks(tiny_runs.run, 1, mended) == [0]
    assert list(logged(tmp_path / "once")) == [2, 3] and list(logged(tmp_path / "ever"))[-1] == 3


def run_and_write_slowly(recipe: Recipe) -> int:
    write = RankFile.write

    def slowly(self: RankFile) -> Any:
        time.sleep(3)
        return write(self)

    RankFile.write = slowly  # type: ignore[method-assign]
    return tiny_runs.run(recipe)


@pytest.mark.slow
def test_what_is_being_written_when_the_data_fails_is_kept(shards: Path, tmp_path: Path) -> None:
    """All ranks know that a sample of the second step cannot be read: none is missed while they wait."""
    damaged, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, damaged)
    recipe = tiny_recipe(damaged, folder, checkpoint__save_interval=1, data__max_failed_share=0.0)
    order = Order(recipe.train.seed, {"16x16": 48})
    _, place = order.step(Place(), 16)
    victim = int(order.members(order.step(place, 16)[0])[3])
    offset, size, _ = json.loads((damaged / "shard-000000.json").read_text())["samples"][victim]["latents"]
    with open(damaged / "shard-000000.tar", "r+b") as tar:
        tar.seek(offset + size - 1)
        tar.write(b"\x55")
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(run_and_write_slowly, 2, recipe)
    assert "1 samples could not be read" in (folder / "train.log").read_text()
    assert RunFolder(folder).latest() == 1 and not list(folder.glob("*.tmp"))


def test_a_complete_run_says_in_what_the_recipe_is_another(
    shards: Path, reference: Path, tmp_path: Path
) -> None:
    folder = copied(reference, tmp_path)
    settings = {"train__train_iters": 10, "optimizer__lr": 0.25, "checkpoint__save": str(folder)}
    before = (folder / "run_config.yaml").read_text()
    assert run_ranks(tiny_runs.run, 1, measured(shards, reference, **settings)) == [0]
    log = (folder / "train.log").read_text()
    assert "nothing to do" in log and "to run this one, give another checkpoint.save" in log
    assert re.search(r"optimizer.lr was \S+ and is 0.25", log)
    assert (folder / "run_config.yaml").read_text() == before


def test_a_start_that_is_refused_leaves_the_recipe_of_the_run(
    shards: Path, killed: Path, tmp_path: Path
) -> None:
    """By it the run's checkpoints are drawn with, converted, and described in their exports."""
    folder = copied(killed, tmp_path)
    before = {path.name: path.read_text() for path in folder.glob("run_config*")}
    other = tiny_recipe(shards, folder, train__train_iters=10, train__ema_decay=0.0)
    assert "holds ema weights, which this recipe does not keep" in run_ranks(refusal, 1, other)[0]
    assert {path.name: path.read_text() for path in folder.glob("run_config*")} == before


def test_two_runs_cannot_share_a_folder(shards: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock():
        said = run_ranks(refusal, 1, tiny_recipe(shards, tmp_path))[0]
    assert f"{tmp_path}: another run is writing this folder (process {os.getpid()} on" in said
    assert not (tmp_path / "run_config.yaml").exists()


def test_a_run_that_goes_on_from_another_and_stops_at_once_is_saved(
    shards: Path, reference: Path, tmp_path: Path
) -> None:
    load = reference / "iter_0000010"
    settings = {"train__train_iters": 11, "checkpoint__load": load}
    soon = tiny_recipe(shards, tmp_path, train__exit_duration_in_mins=1e-9, **settings)
    assert run_ranks(tiny_runs.run, 1, soon) == [75]
    assert RunFolder(tmp_path).iterations() == [10] and RunFolder(tmp_path).latest() == 10


def test_frozen_parameters_stay_and_the_average_can_be_a_start(shards: Path, tmp_path: Path) -> None:
    first = tiny_recipe(
        shards,
        tmp_path / "first",
        train__train_iters=2,
        checkpoint__export="true",
        optimizer__frozen="[context_embedder*,layers.0.*]",
        model__recompute_granularity="full",
    )
    assert run_ranks(tiny_runs.run, 1, first) == [0]
    base, new, average = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (ROOT / "recipes/tiny/base", tmp_path / "first/export", tmp_path / "first/export_ema")
    )
    frozen = {key for key in base if key.startswith(("context_embedder", "transformer_blocks.0."))}
    unchanged = {key for key in base if torch.equal(base[key], new[key])}
    # the last block drops its text output: these queries get no gradient, and decay leaves a zero bias as it is
    assert (
        frozen and unchanged - {"pos_embed.pos_embed", "transformer_blocks.3.attn.add_q_proj.bias"} == frozen
    )
    assert not torch.equal(new["proj_out.weight"], average["proj_out.weight"])

    second = tiny_recipe(
        shards,
        tmp_path / "second",
        train__train_iters=1,
        checkpoint__export="true",
        checkpoint__load=tmp_path / "first",
        checkpoint__finetune="true",
        checkpoint__load_ema="true",
        optimizer__lr=0.0,
    )
    assert run_ranks(tiny_runs.run, 1, second) == [0]
    said = (tmp_path / "second" / "train.log").read_text()
    assert f"the recipe is not that of {tmp_path}/first/iter_0000002, which is loaded:" in said
    assert "optimizer.lr was 0.0005 and is 0.0\n" in said
    for name in ("export", "export_ema"):
        started = load_file(
            tmp_path / "second" / name / "transformer" / "diffusion_pytorch_model.safetensors"
        )
        assert all(torch.equal(average[key], started[key]) for key in average)
    assert RunFolder(tmp_path / "second").latest() == 1


LAYOUTS: list[dict[str, Any]] = [
    {"processes": 2},
    {
        "processes": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "sequence_parallel": "true",
    },
    {"processes": 4, "pipeline_model_parallel_size": 4},
    {"processes": 2, "context_parallel_size": 2},
]
SLOW_LAYOUTS: list[dict[str, Any]] = [
    {"processes": 2, "tensor_model_parallel_size": 2},
    {"processes": 2, "tensor_model_parallel_size": 2, "sequence_parallel": "true"},
    {"processes": 2, "pipeline_model_parallel_size": 2},
    {"processes": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {
        "processes": 8,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "sequence_parallel": "true",
    },
]


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
    ids=lambda layout: "-".join(str(value) for value in layout.values()),
)
def test_the_recipe_does_not_depend_on_the_layout(
    shards: Path, reference: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    settings = {f"parallel__{key}": value for key, value in layout.items() if key != "processes"}
    processes = layout["processes"]
    assert run_ranks(tiny_runs.run, processes, measured(shards, tmp_path, **settings)) == [0] * processes
    one, other = logged(reference), logged(tmp_path)
    assert list(other) == [1, 2, 3, 4, 5]
    for iteration, values in other.items():
        assert values == pytest.approx(one[iteration], rel=1e-5)
    assert len(held_out(tmp_path)) == 2
    for here, expected in zip(held_out(tmp_path), held_out(reference), strict=False):
        assert here == pytest.approx(expected, rel=2e-5)


def measured(shards: Path, folder: Path, **settings: Any) -> Recipe:
    """A run with validation and drift every five iterations; 12 samples in batches of 4 do not divide by 2 replicas."""
    return tiny_recipe(
        shards,
        folder,
        data__validation_path=shards,
        logging__eval_interval=5,
        logging__eval_samples=12,
        logging__drift_interval=5,
        logging__drift_samples=12,
        logging__drift_spans="[[0.9, 0.65]]",
        logging__drift_steps=2,
        **settings,
    )


GOLDEN = Path(__file__).with_name("golden_losses.json")


def test_golden_losses(reference: Path) -> None:
    """The first losses of the recipe."""
    assert_golden(GOLDEN, [loss for loss, _ in logged(reference).values()][:5])


def test_losses_do_not_depend_on_fused_kernels(reference: Path, shards: Path, tmp_path: Path) -> None:
    plain = tiny_recipe(
        shards,
        tmp_path,
        train__train_iters=5,
        model__fused_kernels=False,
        stage__fused_kernels=False,
        checkpoint__export=False,
    )
    assert run_ranks(tiny_runs.run, 1, plain) == [0]
    losses = [loss for loss, _ in logged(tmp_path).values()]
    assert losses == pytest.approx([loss for loss, _ in logged(reference).values()][:5], rel=1e-5)
