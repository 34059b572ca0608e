"""Any recipe on a laptop: its stage, its layout and all of its layers and heads, but narrow, on noise, four steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

from soar_mega.config import ModelConfig, Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.data.made_up import write_made_up_shards
from soar_mega.distributed import check_layout
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import model_sizes
from soar_mega.outputs import OutputFolder, refuse_overlap
from soar_mega.stages import load_recipe

ITERATIONS, SAMPLES_PER_REPLICA, POINTS = 4, 2, 4
BUCKETS, TEXT_LENGTH = ("128x128", "192x128"), 12
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def scale_down(path: str | Path, overrides: Sequence[str], processes: int, writes: bool) -> Recipe:
    """The recipe of a short run of a narrow model, in a folder beside the recipe's own.

    The folder is `<checkpoint.save>_scaled_down`: `inputs` has sizes and shards of noise, which are made anew at each
    start, to the same bytes; `run` is the run, which starts again where it was.

    Args:
        processes: of the whole world.
        writes: whether this process writes the inputs: rank 0.

    Raises:
        ValueError: as `load_recipe` does, or the processes do not fit the recipe's layout.
    """
    recipe = load_recipe(path, overrides)
    parallel = recipe.parallel
    layout = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    check_layout(processes, *layout, parallel.context_parallel_size)
    replicas = processes // (layout[0] * layout[1] * parallel.context_parallel_size)
    folder = Path(f"{Path(recipe.checkpoint.save)}_scaled_down")
    if writes:
        _write_inputs(recipe, folder / "inputs", SAMPLES_PER_REPLICA * replicas)
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in _numbers(recipe, replicas).items()
    ]
    return load_recipe(path, [*overrides, *words, *_places(recipe, folder)])


def _numbers(recipe: Recipe, replicas: int) -> dict[str, Any]:
    train, logging = recipe.train, recipe.logging
    return {
        "model.init": "random",
        "train.train_iters": ITERATIONS,
        "train.global_batch_size": SAMPLES_PER_REPLICA * replicas,
        "train.micro_batch_size": 1,
        "train.points_per_micro_batch": min(train.points_per_micro_batch or train.micro_batch_size, POINTS),
        "optimizer.lr_warmup_iters": min(recipe.optimizer.lr_warmup_iters, 1),
        "optimizer.lr_decay_iters": None,
        "optimizer.lr_decay_start": None,
        "data.encode": "shards",
        "data.num_workers": min(recipe.data.num_workers, 1),
        "checkpoint.finetune": False,
        "checkpoint.load_ema": False,
        "checkpoint.save_interval": ITERATIONS // 2,
        "checkpoint.save_retain_interval": 0,
        "logging.log_interval": 1,
        "logging.eval_interval": min(logging.eval_interval, ITERATIONS // 2),
        "logging.eval_samples": SAMPLES_PER_REPLICA,
        "logging.drift_interval": min(logging.drift_interval, ITERATIONS // 2),
        "logging.drift_samples": SAMPLES_PER_REPLICA,
        "logging.sample_interval": 0,  # there are no encoders
    }


def _places(recipe: Recipe, folder: Path) -> list[str]:
    inputs = folder / "inputs"
    held_out = inputs / "heldout" if recipe.data.validation_path else ""
    return [
        "model.preset=",
        f"model.pipeline_dir={inputs / 'pipeline'}",
        f"data.path={inputs / 'train'}",
        f"data.validation_path={held_out}",
        "checkpoint.load=",
        f"checkpoint.save={folder / 'run'}",
    ]


def _write_inputs(recipe: Recipe, folder: Path, samples: int) -> None:
    refuse_overlap(folder, {"model.pipeline_dir": recipe.model.pipeline_dir, "data.path": recipe.data.path})
    sizes = _published(recipe.model)
    narrow = sizes.family.narrowed(sizes)
    info = DatasetInfo(
        buckets=dict.fromkeys(BUCKETS, 2 * samples),
        latent_channels=narrow.in_channels,
        vae_scale_factor=8,
        text_shape=(TEXT_LENGTH, narrow.joint_attention_dim),
        pooled_size=narrow.pooled_projection_dim,
        max_sequence_length=TEXT_LENGTH,
        text_dtype="float32",
        encoders={},
    )
    with OutputFolder(folder).writing() as new:
        _write_json(new / "pipeline" / "transformer" / "config.json", narrow.to_diffusers())
        scheduler = Path(recipe.model.pipeline_dir, "scheduler", "scheduler_config.json")
        copy = new / "pipeline" / "scheduler" / scheduler.name
        _write_json(copy, SCHEDULER)
        if recipe.model.pipeline_dir and scheduler.is_file():
            copyfile(scheduler, copy)
        for name in ("train", "heldout"):
            write_made_up_shards(new / name, info, recipe.train.seed)


def _published(model: ModelConfig) -> Sizes:
    """The sizes of a recipe; those of its preset where the pipeline is not on this machine."""
    if model.preset and not Path(model.pipeline_dir).is_dir():
        return model_sizes(ModelConfig(preset=model.preset))
    return model_sizes(model)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
