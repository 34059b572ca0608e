"""Where megatron's optimizers keep the float32 main copies of the parameters."""

from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch.nn import Parameter

from soar_mega.engines.kept_weights import MainWeights, Piece
from soar_mega.private_names import MainCopy, distributed_main_copies, float16_main_copies

BY_GROUP = "fp32_from_fp16_params"  # the main copies in a state of the plain optimizer: a list of lists


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

    def complete() -> None:
        gather_parameters(chunks)
        for chunk in chunks:
            chunk.module.weights_changed()  # what is cast to FP8 is made anew

    return MainWeights(parameters, pieces, divided, complete)


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Have the ranks' parts of all parameters complete; nothing is divided with the plain optimizer. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


def _pieces(optimizer: Any) -> Iterator[tuple[Parameter, Piece]]:
    if isinstance(optimizer, DistributedOptimizer):
        copies = distributed_main_copies(optimizer)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        copies = float16_main_copies(optimizer)
    else:
        copies = (MainCopy(p, p, 0) for p in optimizer.get_parameters())
    yield from ((copy.parameter, Piece(copy.main, copy.start)) for copy in copies)


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """A state of megatron's optimizer with dicts where the plain one has lists of its main copies.

    A pipeline rank may train no parameter of a group. dist_checkpointing merges what ranks hold, and lists only where
    they are equally long.
    """
    if BY_GROUP not in state:
        return state
    return state | {BY_GROUP: {n: dict(enumerate(group)) for n, group in enumerate(state[BY_GROUP])}}


def in_lists(state: dict[str, Any], groups: int) -> dict[str, Any]:
    """The opposite of `numbered`, for an optimizer with so many parameter groups."""
    if BY_GROUP not in state:
        return state
    copies = [state[BY_GROUP].get(n, {}) for n in range(groups)]
    return state | {BY_GROUP: [[group[i] for i in range(len(group))] for group in copies]}
