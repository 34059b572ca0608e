"""Any recipe on a laptop: its stage, its layout and all of its layers and heads, but narrow, on noise, four steps."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

from soar_mega.config import ModelConfig, Recipe
from soar_mega.config_checks import check_recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.data.made_up import write_made_up_shards
from soar_mega.distributed import check_layout
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import model_sizes
from soar_mega.outputs import OutputFolder, refuse_overlap

ITERATIONS, SAMPLES_PER_REPLICA, POINTS = 4, 2, 4
BUCKETS, TEXT_LENGTH = ("128x128", "192x128"), 12
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def scale_down(recipe: Recipe, processes: int, writes: bool) -> Recipe:
    """The recipe of a short run of a narrow model, in a folder beside the recipe's own.

    The folder is `<checkpoint.save>_scaled_down`: `inputs` has sizes and shards of noise, which are made anew at each
    start, to the same bytes; `run` is the run, which starts again where it was.

    Args:
        processes: of the whole world.
        writes: whether this process writes the inputs: rank 0.

    Raises:
        ValueError: the processes do not fit the recipe's layout, the folder holds what this program did not write, or
            the stage draws its samples.
    """
    parallel = recipe.parallel
    if recipe.stage.collects:
        raise ValueError(
            f"--scale-down makes up shards, and {recipe.stage.name} draws samples with encoders, a VAE and rewards: "
            "try it on the built-in pipeline with recipes/tiny"
        )
    layout = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    check_layout(processes, *layout, parallel.context_parallel_size)
    replicas = processes // (layout[0] * layout[1] * parallel.context_parallel_size)
    folder = Path(f"{Path(recipe.checkpoint.save)}_scaled_down")
    if writes:
        _write_inputs(recipe, folder / "inputs", SAMPLES_PER_REPLICA * replicas)
    small = _small(recipe, folder, replicas)
    check_recipe(small)
    return small


def _small(recipe: Recipe, folder: Path, replicas: int) -> Recipe:
    train, data, logging, inputs = recipe.train, recipe.data, recipe.logging, folder / "inputs"
    often = ITERATIONS // 2
    return replace(
        recipe,
        model=replace(recipe.model, preset="", pipeline_dir=str(inputs / "pipeline"), init="random"),
        train=replace(
            train,
            train_iters=ITERATIONS,
            global_batch_size=SAMPLES_PER_REPLICA * replicas,
            micro_batch_size=1,
            points_per_micro_batch=min(train.points_per_micro_batch or train.micro_batch_size, POINTS),
        ),
        optimizer=replace(
            recipe.optimizer,
            lr_warmup_iters=min(recipe.optimizer.lr_warmup_iters, 1),
            lr_decay_iters=None,
            lr_decay_start=None,
        ),
        data=replace(
            data,
            path=str(inputs / "train"),
            validation_path=str(inputs / "heldout") if data.validation_path else "",
            encode="shards",
            num_workers=min(data.num_workers, 1),
        ),
        checkpoint=replace(
            recipe.checkpoint,
            save=str(folder / "run"),
            load="",
            finetune=False,
            load_ema=False,
            save_interval=often,
            save_retain_interval=0,
        ),
        logging=replace(
            logging,
            log_interval=1,
            eval_interval=min(logging.eval_interval, often),
            eval_samples=SAMPLES_PER_REPLICA,
            drift_interval=min(logging.drift_interval, often),
            drift_samples=SAMPLES_PER_REPLICA,
            sample_interval=0,  # there are no encoders
        ),
    )


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
