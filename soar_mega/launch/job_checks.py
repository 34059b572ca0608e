"""What a job would refuse at its start, after it has waited in the queue: refused before it goes there."""

import logging
from pathlib import Path

from soar_mega import distributed
from soar_mega.config import Recipe
from soar_mega.config_checks import check_replicas
from soar_mega.convert import is_pipeline, pipeline_parts
from soar_mega.data.fetched import is_remote
from soar_mega.models.common import layout
from soar_mega.models.family import model_sizes
from soar_mega.training.run_exports import check_places

logger = logging.getLogger(__name__)


def check_fit(recipe: Recipe, processes: int) -> None:
    """ValueError where the processes do not fit the layout or the batch, or the run folder is in one that is read."""
    parallel = recipe.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    distributed.check_layout(processes, *sizes)
    check_replicas(recipe.train.global_batch_size, processes // (sizes[0] * sizes[1] * sizes[2]))
    check_places(recipe)


def check_model(recipe: Recipe) -> None:
    """ValueError where the layout does not fit the model, or the pipeline lacks a part that the export needs."""
    layout.check_layout(model_sizes(recipe.model), recipe.parallel)
    if recipe.checkpoint.export and is_pipeline(recipe.model.pipeline_dir):
        pipeline_parts(recipe.model.pipeline_dir)


def check_data(recipe: Recipe) -> None:
    """ValueError where shards or prompts are not there.

    A login node sees what the nodes see, but for their own disks: where nothing of a path is here, that is a warning.
    """
    if recipe.stage.collects:
        _check_there("data.prompts", recipe.data.prompts)
    else:
        _check_there("data.path", recipe.data.path)
    if recipe.logging.eval_interval:
        _check_there("data.validation_prompts", recipe.data.validation_prompts)
    if recipe.logging.eval_interval or recipe.logging.drift_interval:
        _check_there("data.validation_path", recipe.data.validation_path)


def _check_there(key: str, path: str) -> None:
    folder = Path(path).absolute()
    if is_remote(path) or folder.exists():
        return
    nearest = next(above for above in folder.parents if above.exists())
    if nearest == Path(folder.anchor):
        logger.warning("%s: %s is not on this machine: the job fails unless its nodes have it", key, path)
        return
    raise ValueError(f"{key}: {path} is not there: {nearest} holds no {folder.relative_to(nearest).parts[0]}")
