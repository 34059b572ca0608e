"""What a method keeps of the weights: from the first step on, moved as it says, and saved and resumed like the rest."""

import logging

import pytest
import tiny_runs
import torch
from torch import Tensor

from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.stages.points import Points
from soar_mega.stages.settings import SftConfig
from soar_mega.stages.sft import Sft
from soar_mega.training import loop
from soar_mega.training.memory_report import log_memory


class Keeping(Sft):
    """Fine-tuning that keeps two copies, moves one of them after every second step, and tells of its sigmas."""

    keeps = ("old", "reference")
    observes = ("sigma",)

    def loss(self, points: Points, velocity: Tensor) -> Tensor:
        points.observed["sigma"] = points.sigma.to(velocity.device)
        return super().loss(points, velocity)

    def blends(self, iteration: int, is_collection_over: bool) -> dict[str, float]:
        return {"old": 0.25} if iteration % 2 == 0 else {}


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_stage", lambda config, shift, **_: Keeping(config, shift))
    return tiny_runs.make_shards(tmp_path / "shards", samples=16, seed=0)


def pieces(run, name: str) -> dict[str, Tensor]:
    if name == "current":
        return {key: piece.flat.clone() for key, piece in run.engine._main.pieces.items()}
    return {key: piece.clone() for key, piece in run.engine.weights[name].pieces.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_copies_of_a_run(shards, tmp_path):
    common = {"name": "sft", "train__ema_decay": 0.0, "train__global_batch_size": 4}
    folder = tmp_path / "run"
    folder.mkdir()
    with tiny_runs.steps(shards, folder, **common) as run:
        start = pieces(run, "current")
        assert_same(pieces(run, "old"), start)
        statistics = run.learn()
        assert 0.0 < statistics["sigma"] == pytest.approx(run.engine.learned[0].sigma.mean().item())
        assert run.update().ok
        assert_same(pieces(run, "old"), start)  # its time has not come
        run.learn()
        assert run.update().ok
        current = pieces(run, "current")
        assert_same(pieces(run, "old"), {key: start[key].lerp(current[key], 0.75) for key in start})
        assert_same(pieces(run, "reference"), start)
        saver = Saver(RunFolder(folder), run.recipe.checkpoint, run.sizes)
        run.progress.loader = run.loader.state_dict()
        saver.save(run.engine, run.progress)
        saver.finish()
        saved = {name: pieces(run, name) for name in ("current", "old", "reference")}
    with tiny_runs.steps(shards, folder, **common) as run:
        assert run.progress.iteration == 2
        for name, expected in saved.items():
            assert_same(pieces(run, name), expected)
    start_over = {"checkpoint__load": folder, "checkpoint__finetune": "true"}
    with tiny_runs.steps(shards, tmp_path / "next", **common, **start_over) as run:
        for name in saved:  # all begin where that run had come to
            assert_same(pieces(run, name), current)


def test_adapters_need_no_reference(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(SftConfig, "kept_copies", Keeping.keeps)
    settings = {"lora__rank": 2, "train__offload_kept_weights": "true"}
    with tiny_runs.steps(shards, tmp_path / "run", name="sft", **settings) as run:
        assert set(run.engine.weights) == {"ema", "old"}
        assert pieces(run, "old").keys() == set(run.engine.adapters.names)
        elements = sum(run.engine.parameters[name].numel() for name in run.engine.adapters.names)
        with caplog.at_level(logging.INFO, logger="soar_mega"):
            log_memory(run.recipe, run.engine.model.sizes, run.loader.info)
    told = f"kept on the host {2 * 4 * elements / 2**20:.1f} MiB"
    # megatron-core 0.19 warns as well
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("soar_mega")]
    assert messages == [each for each in messages if each.endswith(told)] != []


@pytest.mark.parametrize(
    ("settings", "decays"),
    [
        ({}, {1: 0.25, 3: 0.25, 4: 0.25}),
        ({"train__ema_update_interval": 2, "train__ema_warm_up": "true"}, {4: 0.25}),
        ({"train__ema_warm_up": "true"}, {1: 1 / 10, 3: 3 / 12, 4: 0.25}),
    ],
    ids=["always", "warmed-up-every-second", "warmed-up"],
)
def test_when_the_average_moves(shards, tmp_path, settings, decays):
    """Step 2 is skipped: its loss is infinite."""
    settings = {"name": "sft", "train__ema_decay": 0.25, "train__global_batch_size": 4, **settings}
    with tiny_runs.steps(shards, tmp_path / "run", **settings) as run:
        expected = pieces(run, "current")
        plain = run.stage.loss
        for step in range(1, 5):
            factor = torch.inf if step == 2 else 1.0
            run.stage.loss = lambda points, velocity, by=factor: by * plain(points, velocity)
            run.learn()
            assert run.update().ok == (step != 2)
            if step in decays:
                current = pieces(run, "current")
                expected = {
                    key: value.lerp(current[key], 1.0 - decays[step]) for key, value in expected.items()
                }
            assert_same(pieces(run, "ema"), expected)
