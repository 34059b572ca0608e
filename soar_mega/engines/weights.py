"""Float32 copies of the weights beside the current ones (EMA, reference), cut over ranks like the optimizer.

megatron's optimizer owns a float32 main copy of each trained parameter: with the distributed optimizer, a flat piece
of it per data-parallel rank. A kept copy has a piece for each of those, at the same place. Frozen parameters are not
copied.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Piece:
    """Where this rank's part of a parameter's float32 main copy lives."""

    main: Tensor  # what the optimizer updates
    start: int  # its first element in the flat parameter

    @property
    def flat(self) -> Tensor:
        """The main copy as a flat view."""
        return self.main.detach().view(-1)

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of a parameter-shaped tensor, as a flat view."""
        return whole.view(-1)[self.start : self.start + self.main.numel()]


class MainWeights:
    """The optimizer's main copies by global parameter name, and how to put pieces together."""

    def __init__(self, parameters: dict[str, Parameter], optimizer: Any) -> None:
        self.parameters = parameters
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.pieces: dict[str, Piece] = {}  # of the trained parameters that this rank has a part of
        self._divided = False
        for one in optimizer.chained_optimizers:
            self._divided |= isinstance(one, DistributedOptimizer)
            self.pieces.update({names[id(p)]: piece for p, piece in _pieces(one)})

    def gather(self, part: Callable[[str], Tensor], name: str) -> Tensor:
        """The whole float32 tensor of this tensor- and pipeline-parallel rank, in the parameter's shape.

        `part(name)` gives this rank's flat piece of it. Collective over the data-parallel group.
        """
        parameter = self.parameters[name]
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if name in self.pieces:
            self.pieces[name].of(whole).copy_(part(name))
        if self._divided:
            dist.all_reduce(whole, group=parallel_state.get_data_parallel_group())
        return whole

    @torch.no_grad()
    def assign(self, name: str, whole: Tensor) -> None:
        """Set a parameter and its main copy from a whole tensor."""
        self.parameters[name].copy_(whole)
        if name in self.pieces:
            self.pieces[name].flat.copy_(self.pieces[name].of(whole.contiguous()))


class KeptWeights:
    """One kept copy: an EMA where `decay` is given, else a snapshot."""

    def __init__(self, main: MainWeights, decay: float | None) -> None:
        self._main = main
        self.decay = decay
        self.pieces = {name: piece.flat.float().clone() for name, piece in main.pieces.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the EMA toward the main weights; a snapshot stays as it is."""
        if self.decay is not None:
            for name, kept in self.pieces.items():
                kept.lerp_(self._main.pieces[name].flat, 1.0 - self.decay)

    def whole(self, name: str) -> Tensor:
        """This rank's float32 tensor of a parameter; a frozen one is as it is. Collective over data parallelism."""
        parameter = self._main.parameters[name]
        if not parameter.requires_grad:
            return parameter.detach().float()
        return self._main.gather(self.pieces.__getitem__, name)

    def full(self) -> dict[str, Tensor]:
        """This rank's tensors by global name, as `convert` takes them. Collective over data parallelism."""
        return {name: self.whole(name) for name in self._main.parameters}

    def assign(self, name: str, whole: Tensor) -> None:
        """Set this rank's piece from a whole tensor."""
        if name in self.pieces:
            self.pieces[name].copy_(self._main.pieces[name].of(whole.contiguous()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with these weights inside the context. Collective over data parallelism."""
        saved: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self._main.parameters.items():
                if parameter.requires_grad:
                    saved[name] = parameter.detach().clone()
                    parameter.copy_(self.whole(name))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in saved.items():
                    self._main.parameters[name].copy_(tensor)


def sharded_copy(
    model_state: dict[str, Any], name: str, whole: Callable[[Parameter], Tensor]
) -> dict[str, Any]:
    """Sharded tensors like those of the model, under keys of their own and with `whole(parameter)` as data.

    Args:
        model_state: the model's sharded_state_dict, whose tensors hold the parameters themselves.
        name: of the kept copy; part of the keys.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    parameters = [t for t in nested_values(tensors) if isinstance(t.data, Parameter)]
    return {t.key: make_sharded_optimizer_tensor(t, whole(t.data), f"weights.{name}") for t in parameters}


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
