"""Loss spikes and skipped steps name their samples, and can be computed again."""

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from multirank import RankFailure, run_ranks
from tiny_runs import make_shards, tiny_recipe

from soar_mega.config import Recipe
from soar_mega.data.order import Order, Place
from soar_mega.engines import StepResult
from soar_mega.engines.sample_losses import PointLoss, SampleLoss
from soar_mega.training import anomalies
from soar_mega.training.anomalies import Anomalies, LossWindow
from soar_mega.training.replay import Replay, as_text, by_part, replay

SAMPLES, BATCH, BAD_STEP = 96, 16, 5


def sample_of_step(step: int, place: int) -> int:
    """Which sample of the data set comes in a step, at a place of its batch."""
    order, after = Order(42, {"16x16": SAMPLES}), Place()
    for _ in range(step):
        stretch, after = order.step(after, BATCH)
    return int(order.members(stretch)[place])


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards where the sample that comes at place 6 of step 5 is a hundred times as large."""
    folder = tmp_path_factory.mktemp("data") / "train"
    return make_shards(folder, SAMPLES, seed=1, louder={sample_of_step(BAD_STEP, 6): 100.0})


@pytest.fixture(scope="module")
def spoilt_run(spoilt: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Six steps on two ranks, with a checkpoint at 4."""
    recipe = tiny_recipe(
        spoilt,
        tmp_path_factory.mktemp("runs") / "spoilt",
        train__train_iters=6,
        checkpoint__save_interval=4,
        parallel__pipeline_model_parallel_size=2,
    )
    assert run_ranks(run_with_a_short_window, 2, recipe) == [0, 0]
    return recipe


def run_with_a_short_window(recipe: Recipe) -> int:
    anomalies.LEAST = 3
    return tiny_runs.run(recipe)


def events(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.checkpoint.save) / anomalies.FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_spike_names_its_sample(spoilt_run: Recipe) -> None:
    (event,) = events(spoilt_run)
    assert (
        event["kind"] == "loss_spike"
        and event["iteration"] == BAD_STEP
        and event["base_loss"] > event["limit"]
    )
    assert event["positions"] == [64, 79]
    worst = event["worst_samples"][0]
    bad = sample_of_step(BAD_STEP, 6)
    assert (worst["position"], worst["index"]) == (70, bad)
    assert worst["name"].startswith(f"made-up {bad} (")
    loss = max(point["loss"] for point in worst["points"])
    others = [p["loss"] for sample in event["worst_samples"][1:] for p in sample["points"]]
    assert len(event["worst_samples"]) == anomalies.NAMED and loss > 100 * max(others)
    log = (Path(spoilt_run.checkpoint.save) / "train.log").read_text()
    told = (
        rf"iteration 5: base loss .* is above .*made-up {bad} \(.*\(sample {bad} of the data, position 70 in"
    )
    assert re.search(told, log)


def replay_here(recipe: Recipe, step: int) -> Replay | None:
    logging.getLogger("soar_mega").setLevel(logging.INFO)
    os.chdir(tiny_runs.ROOT)
    return replay(recipe, step)


# from the checkpoint, and from the start
@pytest.mark.parametrize(("step", "start"), [(BAD_STEP, 4), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_a_replay_is_bitwise_the_step(spoilt_run: Recipe, step: int, start: int) -> None:
    folder = Path(spoilt_run.checkpoint.save)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    replayed = run_ranks(replay_here, 2, spoilt_run, step)[0]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert replayed.start == start
    logged = tiny_runs.logged(folder)[step]
    assert (replayed.loss, replayed.grad_norm) == pytest.approx(logged, rel=1e-6)  # the log has seven digits
    if step == BAD_STEP:
        (event,) = events(spoilt_run)
        assert replayed.loss == event["loss"] and replayed.grad_norm == event["grad_norm"]
        assert [s.position for s in replayed.samples[:8]] == [s["position"] for s in event["worst_samples"]]
        assert replayed.samples[0].points[0].loss == event["worst_samples"][0]["points"][0]["loss"]
    assert f"step {step}, computed from iteration {start}: loss {replayed.loss!r}" in as_text(replayed)
    assert len(replayed.samples) == BATCH and not replayed.was_skipped
    total = math.sqrt(sum(norm * norm for norm in replayed.gradient_norms.values()))
    assert total == pytest.approx(replayed.grad_norm, rel=1e-5)
    assert {"layers.0", "layers.3"} <= set(replayed.gradient_norms)


def test_a_replay_of_what_another_run_did(spoilt_run: Recipe, tmp_path: Path) -> None:
    load = Path(spoilt_run.checkpoint.save, "iter_0000004")
    settings = {"train__train_iters": 6, "checkpoint__load": load}
    recipe = tiny_recipe(Path(spoilt_run.data.path), tmp_path / "run", **settings)
    with pytest.raises(RankFailure, match="replay-step 4: this run began with step 5, behind .*iter_0000004"):
        run_ranks(replay_here, 1, recipe, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"engine": "deepspeed", "zero_stage": 1},
        {"engine": "deepspeed", "zero_stage": 3},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
    ids=lambda layout: "-".join(str(value) for value in layout.values()),
)
def test_a_replay_at_every_kind_of_layout(spoilt: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    settings = {f"parallel__{key}": value for key, value in layout.items()}
    recipe = tiny_recipe(
        spoilt,
        tmp_path / "run",
        train__train_iters=BAD_STEP,
        checkpoint__save_interval=BAD_STEP - 2,
        **settings,
    )
    assert run_ranks(run_with_a_short_window, 2, recipe) == [0, 0]
    (event,) = events(recipe)
    replayed = run_ranks(replay_here, 2, recipe, BAD_STEP)[0]
    assert replayed.start == BAD_STEP - 2  # the step between is computed again as well
    assert (replayed.loss, replayed.grad_norm) == (event["loss"], event["grad_norm"])
    assert replayed.samples[0].index == sample_of_step(BAD_STEP, 6) and len(replayed.samples) == BATCH


def test_a_loss_that_is_not_finite_is_told_of(tmp_path: Path) -> None:
    bad = sample_of_step(2, 0)
    shards = make_shards(tmp_path / "data", SAMPLES, seed=1, louder={bad: 1e25})
    recipe = tiny_recipe(shards, tmp_path / "run", train__train_iters=3)
    assert run_ranks(tiny_runs.run, 1, recipe) == [0]
    (event,) = events(recipe)
    assert event["kind"] == "not_finite" and event["iteration"] == 2 and isinstance(event["loss"], str)
    assert event["worst_samples"][0]["index"] == bad
    replayed = run_ranks(replay_here, 1, recipe, 2)[0]
    assert str(replayed.loss) == event["loss"] and replayed.was_skipped and replayed.samples[0].index == bad


def test_auxiliary_points_make_no_spike(tmp_path: Path) -> None:
    """Their losses are large by nature; steps=None fails where a step is looked at closer."""
    seen = Anomalies(tmp_path, 20.0, "base")
    fine = StepResult(ok=True, grad_norm=1.0)
    for step in range(anomalies.LEAST + 1):
        seen.look(None, {"loss": 1.0, "loss/base": 1.0 + 0.1 * (step % 2)}, fine)  # type: ignore[arg-type]
    seen.look(None, {"loss": 900.0, "loss/base": 1.0}, fine)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        seen.look(None, {"loss": 1.0, "loss/base": 900.0}, fine)  # type: ignore[arg-type]


def test_the_worst_sample_is_that_of_the_worst_base_point() -> None:
    def sample(base: float, auxiliary: float) -> SampleLoss:
        points = [
            PointLoss(kind="base", sigma=0.5, loss=base),
            PointLoss(kind="aux", sigma=0.1, loss=auxiliary),
        ]
        return SampleLoss(position=0, index=0, name="made-up", points=points, compared="base")

    assert sample(2.0, 900.0).worst == 2.0
    assert sample(2.0, math.nan).worst == sample(math.inf, 1.0).worst == math.inf


def test_what_is_a_spike() -> None:
    window = LossWindow(20.0)
    for step in range(anomalies.LEAST):
        assert window.limit() == math.inf
        window.add(1.0 + 0.1 * (step % 2))
    assert 2.0 < window.limit() < 2.1
    for _ in range(30):
        window.add(math.nan)
    assert 2.0 < window.limit() < 2.1
    window.add(1000.0)  # one spike does not hide the next
    assert window.limit() < 3.2
    for _ in range(60):
        window.add(5.0)  # a new level is soon no surprise
    assert window.limit() > 5.0


def test_heavy_tails_are_no_spikes() -> None:
    torch.manual_seed(0)
    losses = torch.distributions.LogNormal(0.0, 0.5).sample((2000,)).tolist()
    window, spikes = LossWindow(20.0), 0
    for loss in losses:
        spikes += loss > window.limit()
        window.add(loss)
    assert spikes == 0
    assert LossWindow(0.0).limit() == math.inf


def test_norms_by_part() -> None:
    norms = {"layers.0.a": 3.0, "layers.0.b.c": 4.0, "layers.10.a": 1.0, "x_embedder.weight": 2.0}
    assert by_part(norms) == {"layers.0": 5.0, "layers.10": 1.0, "x_embedder": 2.0}
