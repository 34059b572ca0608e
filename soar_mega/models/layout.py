"""How a transformer is cut over tensor- and pipeline-parallel ranks."""

import math

from soar_mega.config import ParallelConfig
from soar_mega.models.config import MMDiTConfig


def check_layout(config: MMDiTConfig, parallel: ParallelConfig) -> None:
    """Raise a ValueError with possible values unless heads divide by TP and every stage gets a layer."""
    heads, tensor = config.num_attention_heads, parallel.tensor_model_parallel_size
    if heads % tensor:
        possible = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ValueError(
            f"parallel.tensor_model_parallel_size={tensor} does not divide the {heads} attention heads of this model; "
            f"possible are {', '.join(map(str, possible))}"
        )
    if parallel.pipeline_model_parallel_size > config.num_layers:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} is more than the "
            f"{config.num_layers} layers of this model: each stage needs at least one"
        )


def is_sequence_parallel(parallel: ParallelConfig) -> bool:
    """Whether tokens are sharded; with one tensor-parallel rank there is nothing to shard."""
    return parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1


def stage_layers(num_layers: int, stages: int, stage: int) -> range:
    """Global numbers of the layers on a pipeline stage: contiguous, as even as possible."""
    return range(num_layers * stage // stages, num_layers * (stage + 1) // stages)


def padded_length(length: int, tensor_parallel: int) -> int:
    """Tokens of a stream while it is sharded: a multiple of the ranks and of 16 (the tile of low-precision GEMMs)."""
    multiple = math.lcm(tensor_parallel, 16)
    return -(-length // multiple) * multiple
