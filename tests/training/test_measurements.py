"""What a run writes beside its weights: curves, images, its configuration."""

import time
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.distributed as dist
from multirank import run_ranks
from PIL import Image
from tiny_runs import ROOT, make_shards, tiny_recipe

from soar_mega.config import LoggingConfig, ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.stages import load_recipe
from soar_mega.training.measurements import Measurements
from soar_mega.training.samples import grid


def curves(folder: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Steps of each scalar, and the names of the images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in tags["scalars"]}, tags["images"]


def test_curves_images_and_configuration(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", 16, seed=1)
    (tmp_path / "run").mkdir()
    recipe = tiny_recipe(
        shards,
        tmp_path / "run",
        train__train_iters=2,
        train__global_batch_size=8,
        data__validation_path=shards,
        logging__tensorboard="true",
        logging__eval_interval=2,
        logging__eval_samples=4,
        logging__drift_interval=2,
        logging__drift_samples=4,
        logging__sample_interval=2,
        logging__sample_steps=2,
    )
    assert run_ranks(tiny_runs.run, 1, recipe) == [0]
    scalars, images = curves(tmp_path / "run")
    steps = ["loss", "loss/base", "loss/aux", "k/q05", "k/q50", "k/q95", "grad-norm", "learning-rate"]
    for name in [*steps, "throughput/samples-per-second", "throughput/tflops-per-process", "memory/peak-gib"]:
        assert scalars[name] == [1, 2], name
    for name in ["validation/loss", *(f"validation/loss_q{q}" for q in (1, 2, 3, 4)), "drift/0.9-0.65"]:
        assert scalars[name] == [0, 2], name
    assert scalars["drift/0.5-0.25/relative"] == [0, 2]
    assert any(name.startswith("loss/base_q") for name in scalars)
    assert images == ["samples"]
    with Image.open(tmp_path / "run" / "samples" / "iter_0000002.png") as picture:
        assert picture.size == (198, 198)  # four prompts, enlarged to 96 pixels, with gaps of 2
        assert len(picture.getcolors(100_000)) > 10
    assert load_recipe(tmp_path / "run" / "run_config.yaml") == recipe


class SlowEvents:
    """Curves on a slow disk."""

    def image(self, *args: object) -> None:
        time.sleep(0.5)


class Squares:
    """A grid of one sample."""

    def draw(self, engine: object) -> torch.Tensor | None:
        return torch.zeros(3, 4, 4) if dist.get_rank() == 0 else None


def whether_the_grid_is_there(folder: Path) -> bool:
    start_world(ParallelConfig())
    measurements = Measurements.__new__(Measurements)
    measurements._settings, measurements._folder = LoggingConfig(sample_interval=1), folder
    measurements._engine = None  # type: ignore[assignment]
    measurements._held_out = measurements._rewards = None
    measurements._events, measurements._grid = SlowEvents(), Squares()  # type: ignore[assignment]
    measurements.take(1)
    return (folder / "samples" / "iter_0000001.png").exists()


def test_all_ranks_wait_for_the_grid(tmp_path: Path) -> None:
    """In the phase of the measurements: the next step has less time."""
    assert run_ranks(whether_the_grid_is_there, 2, tmp_path) == [True, True]


def test_grid() -> None:
    images = torch.stack([torch.full((3, 2, 3), value) for value in (0.0, 0.25, 0.5)])
    sheet = grid(images, gap=1)
    assert sheet.shape == (3, 7, 9)
    assert sheet[0, 1, 1] == 0.0 and sheet[0, 1, 5] == 0.25 and sheet[0, 4, 1] == 0.5
    assert sheet[0, 4, 5] == 1.0 and sheet[:, 0].eq(1.0).all()


@pytest.mark.parametrize("name", ["pretrain", "sft", "sft_multi", "soar", "mixflow"])
def test_tiny_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / "tiny" / f"{name}.yaml")
    arm = {"pretrain": "sft"}.get(name, name)
    assert recipe.stage.name == arm and recipe.model.dtype == "fp32"


def test_the_three_arms_differ_in_their_stage_alone() -> None:
    arms = [load_recipe(ROOT / "recipes" / "tiny" / f"{name}.yaml") for name in ("sft", "sft_multi", "soar")]
    for group in ("model", "parallel", "train", "optimizer", "data", "logging"):
        assert all(getattr(arm, group) == getattr(arms[0], group) for arm in arms), group
    assert arms[1].stage.num_auxiliary_points == arms[2].stage.num_auxiliary_points == 2
    assert arms[1].stage.sampling_steps == arms[2].stage.sampling_steps == 5
