"""What training takes on each rank, told when a run starts: by the memory model, before it has been allocated."""

import logging

from soar_mega.config import Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.distributed import data_size
from soar_mega.models.common.memory import rank_memory, workload
from soar_mega.models.common.sizes import Sizes

logger = logging.getLogger(__name__)


def log_memory(recipe: Recipe, sizes: Sizes, info: DatasetInfo) -> None:
    """A line for each pipeline rank; those of its tensor-, context- and data-parallel ranks take the same."""
    size, text_length = info.latent_shape(info.largest_bucket)[1:], info.text_shape[0]
    work = workload(recipe, data_size(), size, text_length, is_told=sizes.guidance_embeds)
    for rank in range(recipe.parallel.pipeline_model_parallel_size):
        told = rank_memory(sizes, recipe, work, data_size(), rank).words()
        logger.info("memory of a rank (pipeline rank %d), as predicted | %s", rank, told)
