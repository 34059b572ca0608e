"""What a scaled-down run reads: narrow sizes, and shards of noise; or a pipeline with tiny encoders, and prompts."""

import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns
from typing import Any, cast

from soar_mega.config import ModelConfig, Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.data.made_up import write_made_up_shards
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import model_sizes
from soar_mega.outputs import OutputFolder, refuse_overlap
from soar_mega.stages import CollectingConfig

log = logging.getLogger(__name__)

BUCKETS, TEXT_LENGTH = ("128x128", "192x128"), 12
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
ENCODERS = Path(__file__).resolve().parents[2] / "recipes" / "tiny"  # of pipelines of each family
PROMPTS, REWARD = "prompts.txt", "jpeg_compressibility"
OF_ENCODERS = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")  # of sizes


def write_inputs(recipe: Recipe, folder: Path, samples: int) -> None:
    """Writes them into a folder that this program may replace; `samples` are those of a global batch.

    Raises:
        ValueError: the folder holds what this program did not write, or the recipe's model is not known.
    """
    refuse_overlap(folder, {"model.pipeline_dir": recipe.model.pipeline_dir, "data.path": recipe.data.path})
    sizes = _published(recipe.model)
    narrow = sizes.family.narrowed(sizes)
    with OutputFolder(folder).writing() as new:
        if isinstance(recipe.stage, CollectingConfig):
            narrow = _write_encoders(narrow, new / "pipeline")
            (new / PROMPTS).write_text("".join(f"a red {number}\n" for number in range(2 * samples)))
            log.info(
                "scaled down: %d made-up prompts, the built-in encoders and the reward %s stand in for "
                "data.prompts=%s, those of %s and the rewards %s",
                *(2 * samples, REWARD, recipe.data.prompts, recipe.model.pipeline_dir),
                ", ".join(recipe.stage.rewards),
            )
            if recipe.data.validation_path:
                log.info(
                    "scaled down: nothing stands in for data.validation_path=%s: nothing is measured on its samples",
                    recipe.data.validation_path,
                )
        else:
            _write_shards(recipe, narrow, new, samples)
        _write_json(new / "pipeline" / "transformer" / "config.json", narrow.to_diffusers())
        scheduler = Path(recipe.model.pipeline_dir, "scheduler", "scheduler_config.json")
        copy = new / "pipeline" / "scheduler" / scheduler.name
        _write_json(copy, SCHEDULER)
        if recipe.model.pipeline_dir and scheduler.is_file():
            copyfile(scheduler, copy)


def _write_encoders(narrow: Sizes, folder: Path) -> Sizes:
    """Text encoders and VAE of the built-in pipeline of the same family; the sizes that fit them."""
    of_folder = {
        path.parents[1]: model_sizes(ModelConfig(pipeline_dir=str(path.parents[1])))
        for path in sorted(ENCODERS.glob("*/transformer/config.json"))
    }
    source, sizes = next((path, sizes) for path, sizes in of_folder.items() if sizes.family is narrow.family)
    copytree(source, folder, ignore=ignore_patterns("transformer", "scheduler", "training_facts.json"))
    own = {field.name for field in fields(cast(Any, narrow))}  # others follow from these
    fitting = {name: getattr(sizes, name) for name in OF_ENCODERS if name in own}
    return replace(cast(Any, narrow), **fitting)


def _write_shards(recipe: Recipe, narrow: Sizes, folder: Path, samples: int) -> None:
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
    for name in ("train", "heldout"):
        write_made_up_shards(folder / name, info, recipe.train.seed)


def _published(model: ModelConfig) -> Sizes:
    """The sizes of a recipe; those of its preset where the pipeline is not on this machine."""
    if model.preset and not Path(model.pipeline_dir).is_dir():
        return model_sizes(ModelConfig(preset=model.preset))
    return model_sizes(model)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
