"""What training takes on each rank, told when a run starts: by the memory model, before it has been allocated."""

import logging

from soar_mega.config import Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.distributed import data_size
from soar_mega.models.common.memory import Memory, rank_memory, workload
from soar_mega.models.common.sizes import Sizes

logger = logging.getLogger(__name__)


def log_memory(recipe: Recipe, sizes: Sizes, info: DatasetInfo) -> None:
    """A line for each pipeline rank; those of its tensor-, context- and data-parallel ranks take the same."""
    size, text_length = info.latent_shape(info.largest_bucket)[1:], info.text_shape[0]
    work = workload(recipe, data_size(), size, text_length, is_told=sizes.guidance_embeds)
    for rank in range(recipe.parallel.pipeline_model_parallel_size):
        told = in_words(rank_memory(sizes, recipe, work, data_size(), rank))
        logger.info("memory of a rank (pipeline rank %d), as predicted | %s", rank, told)


def in_words(memory: Memory) -> str:
    """The sum and its parts, and what is kept on the host."""
    parts = [f"{name}: {_amount(size)}" for name, size in memory.parts.items() if size]
    if memory.on_host:
        parts.append(f"kept on the host: {_amount(memory.on_host)}")
    return " | ".join([f"in all: {_amount(memory.total)}", *parts])


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
