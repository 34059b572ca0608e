"""Where megatron's optimizers keep the float32 main copies of the parameters."""

from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch.nn import Parameter

from soar_mega.engines.weights import MainWeights, Piece


def main_weights(
    parameters: dict[str, Parameter], optimizer: Any, chunks: list[DistributedDataParallel]
) -> MainWeights:
    """The main copies behind a chain of megatron's optimizers, by global parameter name.

    The distributed optimizer's parameters are views of the buffers of `chunks`, which are gathered bucket by bucket.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    chain = optimizer.chained_optimizers
    pieces = {names[id(p)]: piece for one in chain for p, piece in _pieces(one)}
    divided = any(isinstance(one, DistributedOptimizer) for one in chain)
    return MainWeights(parameters, pieces, divided, complete=lambda: gather_parameters(chunks))


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Have the ranks' parts of all parameters complete; nothing is divided with the plain optimizer. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


def _pieces(optimizer: Any) -> Iterator[tuple[Parameter, Piece]]:
    if isinstance(optimizer, DistributedOptimizer):
        pairs = [
            *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
            *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
        ]
        for parameters, mains in pairs:
            for parameter, main in zip(parameters, mains, strict=True):
                start = optimizer._get_model_param_range_map(parameter)["param"].start
                yield parameter, Piece(main, start)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(
            optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True
        ):
            yield from ((p, Piece(main, 0)) for p, main in zip(parameters, mains, strict=True))
        for parameters in optimizer.fp32_from_fp32_groups:
            yield from ((p, Piece(p, 0)) for p in parameters)
    else:
        yield from ((p, Piece(p, 0)) for p in optimizer.get_parameters())
