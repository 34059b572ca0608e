"""How a transformer is cut over tensor-, context- and pipeline-parallel ranks."""

from soar_mega.config import ParallelConfig
from soar_mega.models.common.pipeline_layout import stage_layers
from soar_mega.models.common.sizes import Sizes


def check_layout(config: Sizes, parallel: ParallelConfig) -> None:
    """Raise a ValueError with possible values unless heads divide by TP x CP and every stage gets its layers."""
    heads, tensor, context = (
        config.num_attention_heads,
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
    )
    if heads % tensor:
        raise ValueError(
            f"parallel.tensor_model_parallel_size={tensor} does not divide the {heads} attention heads of this model; "
            f"possible are {divisors(heads)}"
        )
    if heads % (tensor * context):
        raise ValueError(
            f"parallel.context_parallel_size={context} does not divide the {heads // tensor} attention heads of each "
            f"tensor-parallel rank of this model; possible are {divisors(heads // tensor)} with "
            f"parallel.tensor_model_parallel_size={tensor}, and {divisors(heads)} with 1"
        )
    stage_layers(config, parallel)


def is_sequence_parallel(parallel: ParallelConfig) -> bool:
    """Whether tokens are sharded; with one tensor-parallel rank there is nothing to shard."""
    return parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1


def divisors(heads: int) -> str:
    """The numbers of ranks that so many heads can be cut over, in words."""
    return ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
