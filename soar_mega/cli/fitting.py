"""What a model weighs on the ranks of a layout, and what of a step fits in the memory of a GPU."""

import argparse
from pathlib import Path
from typing import Any

from soar_mega import layer_checks
from soar_mega.cli.numbers import check_at_least_one
from soar_mega.config import ModelConfig, ParallelConfig, Recipe, TrainConfig
from soar_mega.gpus import HOPPER, usable_memory
from soar_mega.models.common.memory import largest_rank, workload
from soar_mega.models.common.micro_batches import recommend
from soar_mega.models.common.sizes import PIXELS, image_side
from soar_mega.models.common.summary import summarize
from soar_mega.models.family import find_sizes
from soar_mega.stages import SoarConfig, load_recipe

# options of `doctor` that a recipe has as settings, and what they are without one
SETTINGS: dict[str, tuple[str, Any]] = {
    "tensor": ("parallel.tensor_model_parallel_size", 1),
    "pipeline": ("parallel.pipeline_model_parallel_size", 1),
    "virtual_pipeline": ("parallel.virtual_pipeline_model_parallel_size", None),
    "global_batch_size": ("train.global_batch_size", 32),
    "points": ("stage.num_auxiliary_points", 6),
}


def describe(arguments: argparse.Namespace) -> str:
    """What `doctor` says of a model or of a recipe.

    Raises:
        ValueError: no such model, a recipe that is wrong, or a layout that is not possible.
    """
    numbers = ("gpus", "image_size", "text_length", *SETTINGS)
    check_at_least_one(arguments, *(name for name in numbers if getattr(arguments, name) is not None))
    recipe = asked_recipe(arguments)
    model = arguments.model or model_of(recipe.model)
    said = [summarize(model, recipe.parallel)]
    if arguments.gpu:
        said.append(what_fits(arguments, model, recipe))
    return "\n\n".join(said)


def model_of(model: ModelConfig) -> str:
    """The folder of a recipe's model; its preset where that folder is on another machine."""
    is_here = model.pipeline_dir and Path(model.pipeline_dir).is_dir()
    return model.pipeline_dir if is_here or not model.preset else model.preset


def asked_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of the command line, or SOAR at its layout. With TP the sequence is parallel too, as in our recipes.

    Raises:
        ValueError: settings without a recipe, or in a recipe what is no setting of it.
    """
    given = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.recipe:
        options = [f"{SETTINGS[name][0]}={value}" for name, value in given.items() if value is not None]
        return load_recipe(arguments.recipe, [*arguments.overrides, *options])
    if arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]} is a setting of a recipe: say which with --recipe FILE")
    says = {name: SETTINGS[name][1] if value is None else value for name, value in given.items()}
    return Recipe(
        model=ModelConfig(preset=arguments.model),
        stage=SoarConfig(num_auxiliary_points=says["points"]),
        parallel=ParallelConfig(
            tensor_model_parallel_size=says["tensor"],
            pipeline_model_parallel_size=says["pipeline"],
            virtual_pipeline_model_parallel_size=says["virtual_pipeline"],
            sequence_parallel=says["tensor"] > 1,
        ),
        train=TrainConfig(global_batch_size=says["global_batch_size"]),
    )


def what_fits(arguments: argparse.Namespace, model: str, recipe: Recipe) -> str:
    """What a recipe takes on GPUs of a kind as it is, and the sizes of micro-batches that are best there."""
    parallel, sizes = recipe.parallel, find_sizes(model)
    ranks = parallel.replica_size
    if arguments.gpus % ranks:
        raise ValueError(f"--gpus {arguments.gpus} must be a multiple of the layout's TP x PP x CP = {ranks}")
    side = image_side(sizes, arguments.image_size)
    text_length = arguments.text_length or sizes.family.text_tokens
    data_size, latent_size = arguments.gpus // ranks, (side // PIXELS, side // PIXELS)
    room = usable_memory(arguments.gpu)
    lines = [
        f"{arguments.gpus} {arguments.gpu} at {side} px and {text_length} text tokens, by the memory "
        f"model, of {room / 2**30:.1f} GiB usable:"
    ]
    if arguments.recipe:
        work = workload(recipe, data_size, latent_size, text_length, is_told=sizes.guidance_embeds)
        memory = largest_rank(sizes, recipe, work, data_size)
        fits = "" if memory.total <= room else ", which DOES NOT FIT"
        lines.append(
            f"as the recipe says: {work.micro_batches} training forwards of a step, {memory.words()}{fits}"
        )
    if recipe.model.fp8:
        lines.append("(activations are counted as in bf16, of which FP8 keeps less)")
    found = recommend(sizes, recipe, data_size, latent_size, text_length, room)
    if found is None:
        lines.append("one point does not fit even with recomputation: use more TP or PP, or more GPUs")
        return "\n".join(lines)
    lines += ["the fewest training forwards that fit:", found.words()]
    if parallel.sequence_parallel and not arguments.recipe:
        lines.append("  parallel.sequence_parallel=true")
    if arguments.gpu in HOPPER and layer_checks.has_flash_3(sizes.attention_head_dim):
        lines.append(
            "  model.attention_backend=flash model.dtype=bf16: flash-attn 3, which is installed here"
        )
    return "\n".join(lines)
