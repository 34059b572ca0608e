"""Short runs of recipes/tiny/soar.yaml on made-up shards, and what they leave behind."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.data.made_up import write_made_up_shards
from soar_mega.distributed import start_world
from soar_mega.stages import load_recipe
from soar_mega.training.loop import Steps, make_loader
from soar_mega.training.run import train

ROOT = Path(__file__).parents[1]


def make_shards(
    folder: Path, samples: int, seed: int, louder: dict[int, float] | None = None, square: int | None = None
) -> Path:
    """Shards of keyed noise with the shapes of the tiny pipeline: the same numbers with every version of a library.

    Args:
        louder: factors on the latents of some samples.
        square: how many there are before wide ones follow; None: all are square.
    """
    square = samples if square is None else square
    sizes = {"16x16": square, "32x16": samples - square}
    info = DatasetInfo(
        buckets={bucket: count for bucket, count in sizes.items() if count},
        latent_channels=4,
        vae_scale_factor=2,
        text_shape=(20, 64),
        pooled_size=64,
        max_sequence_length=10,
        text_dtype="float32",
        encoders={},
    )
    write_made_up_shards(folder, info, seed, louder)
    return folder


def tiny_words(shards: Path, save: Path, **overrides: Any) -> list[str]:
    """The overrides of a short run of a tiny recipe that logs each step; `group__key=value` for anything else."""
    settings = {
        "model.pipeline_dir": ROOT / "recipes" / "tiny" / "base",
        "data.path": shards,
        "data.validation_path": "",
        "checkpoint.save": save,
        "checkpoint.export": "false",
        "checkpoint.save_interval": 1000,
        "train.train_iters": 5,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 4,
        "train.points_per_micro_batch": 12,
        "logging.log_interval": 1,
        "logging.tensorboard": "false",
        "logging.eval_interval": 0,
        "logging.drift_interval": 0,
        "logging.sample_interval": 0,
    }
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def tiny_recipe(shards: Path, save: Path, name: str = "soar", **overrides: Any) -> Recipe:
    """The recipe of such a run."""
    return load_recipe(ROOT / "recipes" / "tiny" / f"{name}.yaml", tiny_words(shards, save, **overrides))


def run(recipe: Recipe) -> int:
    """Trains on this process; for `run_ranks`."""
    logging.getLogger("soar_mega").setLevel(logging.INFO)
    os.chdir(ROOT)
    return train(recipe)


@contextmanager
def steps(shards: Path, folder: Path, **overrides: Any) -> Iterator[Steps]:
    """A run of the tiny recipe that starts, or goes on, in this process."""
    recipe = tiny_recipe(shards, folder, **overrides)
    start_world(recipe.parallel)
    run = Steps(recipe, RunFolder(folder), make_loader(recipe))
    try:
        yield run
    finally:
        run.close()


def losses(
    shards: Path,
    folder: Path,
    count: int,
    prepare: Callable[[torch.nn.Module], object] = lambda model: None,
    **overrides: Any,
) -> Tensor:
    """The losses [count] of a run's first steps in this process; `prepare` is called with the model before them."""
    with steps(shards, folder, train__train_iters=count, **overrides) as run:
        prepare(run.engine.model)
        found = []
        for _ in range(count):
            found.append(run.learn()["loss"])
            assert run.update().ok
    return torch.tensor(found)


def smoothed(curve: Tensor, window: int) -> Tensor:
    """Means of `window` steps after another."""
    return curve.unflatten(0, (-1, window)).mean(dim=1)


def logged(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each iteration, from the log."""
    line = r" iteration +(\d+)/ +\d+ \| .* loss: ([\d.E+-]+) \| grad norm: ([\d.E+-]+) \|"
    found = re.findall(line, (folder / "train.log").read_text())
    return {int(iteration): (float(loss), float(norm)) for iteration, loss, norm in found}


def held_out(folder: Path) -> list[dict[str, float]]:
    """The held-out measurements, in order, from the log."""
    lines = re.findall(r" held-out at iteration \d+ \| (.*) \|\n", (folder / "train.log").read_text())
    pairs = [[part.rsplit(": ", 1) for part in line.split(" | ")] for line in lines]
    return [{name: float(value) for name, value in line} for line in pairs]


def tensors(checkpoint: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, and its other content; in a process with a world."""
    return dist_checkpointing.load_plain_tensors(str(checkpoint))
