"""Where megatron's optimizers keep the float32 main copies of the parameters."""

from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch.nn import Parameter

from soar_mega.engines.weights import MainWeights, Piece
from soar_mega.private_names import MainCopy, distributed_main_copies, float16_main_copies


def main_weights(parameters: dict[str, Parameter], optimizer: Any) -> MainWeights:
    """The main copies behind a chain of megatron's optimizers, by global parameter name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    chain = optimizer.chained_optimizers
    pieces = {names[id(p)]: piece for one in chain for p, piece in _pieces(one)}
    return MainWeights(parameters, pieces, any(isinstance(one, DistributedOptimizer) for one in chain))


def _pieces(optimizer: Any) -> Iterator[tuple[Parameter, Piece]]:
    if isinstance(optimizer, DistributedOptimizer):
        copies = distributed_main_copies(optimizer)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        copies = float16_main_copies(optimizer)
    else:
        copies = (MainCopy(p, p, 0) for p in optimizer.get_parameters())
    yield from ((copy.parameter, Piece(copy.main, copy.start)) for copy in copies)
