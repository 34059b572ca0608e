"""Where DeepSpeed keeps this rank's part of the float32 weights, moments and gradients, at each ZeRO stage.

At stage 0 they are whole. At stages 1 and 2 the parameters of a group lie in one flat vector, of which each
data-parallel rank owns a range; at stage 3 each parameter, its computing copy too, is cut into equal parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from soar_mega.distributed import device
from soar_mega.engines.kept_weights import MainWeights, Piece
from soar_mega.private_names import flat_parameters, forget_gradients, partition, zero_gradient, zero_part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ZeroPiece(Piece):
    """A piece inside the tensor that the optimizer updates."""

    owner: Tensor
    offset: int  # the piece's first element in the flat owner

    def of_owner(self, tensor: Tensor) -> Tensor:
        """The piece's part of a tensor that is laid out as its owner, a moment: a flat view."""
        return tensor.view(-1)[self.offset : self.offset + self.main.numel()]


def zero_pieces(
    engine: Any, stage: int, parameters: dict[str, Parameter], groups: list[dict[str, Any]]
) -> dict[str, ZeroPiece]:
    """This rank's piece of each trained parameter.

    Args:
        engine: DeepSpeed's.
        groups: the optimizer's parameter groups.
    """
    pieces = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            piece = _piece(engine, stage, parameter, groups)
            if piece is not None:
                pieces[name] = piece
    return pieces


def _piece(engine: Any, stage: int, p: Any, groups: list[dict[str, Any]]) -> ZeroPiece | None:
    if stage == 0:
        return ZeroPiece(p, 0, p, 0)
    part = zero_part(engine, stage, p, groups)
    if part is None or not part.count:
        return None
    main = part.owner.detach()[part.offset : part.offset + part.count]
    return ZeroPiece(main, part.start, part.owner, part.offset)


def local_gradient(stage: int, parameter: Any, piece: ZeroPiece) -> Tensor:
    """The gradient of a piece, flat, averaged over the data-parallel ranks; after a backward at the boundary."""
    gradient = _held_gradient(stage, parameter).reshape(-1)
    if stage == 3:
        return gradient[: piece.main.numel()]
    # bf16 at stage 1 and parameters that are whole on this rank hold more than the piece
    return piece.of(gradient) if gradient.numel() == parameter.numel() else gradient


def scale_gradient(stage: int, parameter: Any, factor: float) -> None:
    """Multiply this rank's gradient of a parameter, which is about to be used by the optimizer."""
    gradient = _held_gradient(stage, parameter).mul_(factor)
    if stage == 3:
        safe_set_local_grad(parameter, gradient)  # with offload it was a copy


def _held_gradient(stage: int, parameter: Any) -> Tensor:
    if stage == 0:
        return parameter.grad
    if stage == 3:
        return safe_get_local_grad(parameter)
    return zero_gradient(parameter)


def drop_gradients(engine: Any, stage: int) -> None:
    """Forget what earlier backwards have accumulated, as DeepSpeed does after a step that it skips."""
    if stage == 0:
        engine.zero_grad()
    else:
        forget_gradients(engine.optimizer, stage)


def main_weights(
    engine: Any, stage: int, parameters: dict[str, Parameter], pieces: dict[str, ZeroPiece]
) -> MainWeights:
    """The main copies behind DeepSpeed's engine."""
    if stage == 3:
        return PartitionedWeights(parameters, pieces, engine.optimizer)
    divided = stage > 0
    flat = flat_parameters(engine.optimizer) if divided else []

    def complete() -> None:
        _gather(flat)
        engine.module.weights_changed()  # what is cast to FP8 is made anew

    return MainWeights(parameters, pieces, divided, complete)


def _gather(flat: list[Tensor]) -> None:
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        for vector in flat:
            dist.all_gather_into_tensor(vector, vector.chunk(group.size())[group.rank()], group=group)


class PartitionedWeights(MainWeights):
    """At stage 3 a parameter is empty outside a forward: its parts are read and written where they lie."""

    def __init__(
        self, parameters: dict[str, Parameter], pieces: dict[str, ZeroPiece], optimizer: Any
    ) -> None:
        super().__init__(parameters, pieces, divided=True, complete=lambda: None)  # a forward gathers
        self._optimizer = optimizer

    def shape(self, name: str) -> torch.Size:
        return self.parameters[name].ds_shape  # type: ignore[attr-defined]

    def value(self, name: str) -> Tensor:
        p: Any = self.parameters[name]
        start, count = partition(p)
        whole = torch.zeros(p.ds_numel, dtype=p.dtype, device=device())
        whole[start : start + count].copy_(p.ds_tensor[:count])
        dist.all_reduce(whole, group=parallel_state.get_data_parallel_group())
        return whole.view(p.ds_shape)

    @torch.no_grad()
    def set_value(self, name: str, whole: Tensor) -> None:
        self._release()
        p: Any = self.parameters[name]
        start, count = partition(p)
        p.ds_tensor[:count].copy_(whole.reshape(-1)[start : start + count])

    def _show(self, part: Callable[[str], Tensor]) -> None:
        self._release()
        super()._show(part)

    def _held(self, name: str) -> Tensor:
        return self.parameters[name].ds_tensor[: self.pieces[name].main.numel()]  # type: ignore[attr-defined]

    def _release(self) -> None:
        """Have no parameter gathered: what a forward finds gathered it does not read again."""
        self._optimizer.parameter_offload.partition_all_parameters()
