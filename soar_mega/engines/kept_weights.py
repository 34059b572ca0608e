"""Float32 copies of the weights beside the current ones (EMA, reference), cut over ranks like the optimizer.

An optimizer owns a float32 main copy of each trained parameter: megatron's distributed optimizer and ZeRO a flat piece
of it per data-parallel rank. A kept copy has a piece for each of those, at the same place. Frozen parameters are not
copied.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor
from torch.nn import Parameter

from soar_mega.distributed import device
from soar_mega.engines.on_demand import without_room


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
    """The optimizer's main copies by global parameter name, and how to put pieces together.

    Args:
        pieces: of the trained parameters that this rank has a part of.
        divided: whether the data-parallel (and context-parallel) ranks have different parts.
        complete: has the ranks give each other the parts of the parameters that they have written, in one go.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        pieces: Mapping[str, Piece],
        divided: bool,
        complete: Callable[[], None],
    ) -> None:
        self.parameters = parameters
        self.pieces = pieces
        self.divided = divided
        self._complete = complete
        self._shown: Callable[[str], Tensor] | None = None  # in place of the main copies

    def gather(self, part: Callable[[str], Tensor], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole tensor of this tensor- and pipeline-parallel rank, in the parameter's shape.

        `part(name)` gives this rank's flat piece of it. Collective over the data-parallel group.
        """
        whole = torch.zeros(self.shape(name), dtype=dtype, device=device())
        if name in self.pieces:
            self.pieces[name].of(whole).copy_(part(name))
        if self.divided:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(whole, group=group)
        return whole

    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter on this tensor-parallel rank."""
        return self.parameters[name].shape

    def value(self, name: str) -> Tensor:
        """A parameter as the model computes with it, whole. Collective over the data-parallel group."""
        return self.parameters[name].detach()

    def exact(self, name: str) -> Tensor:
        """A parameter as the optimizer has it, whole and float32. Collective over the data-parallel group."""
        if not self.parameters[name].requires_grad:
            return self.value(name).float()
        return self.gather(lambda trained: self.pieces[trained].flat, name)

    @torch.no_grad()
    def assign(self, name: str, whole: Tensor) -> None:
        """Set a parameter and its main copy from a whole tensor."""
        self.set_value(name, whole)
        if name in self.pieces:
            self.pieces[name].flat.copy_(self.pieces[name].of(whole.contiguous()))

    @torch.no_grad()
    def set_value(self, name: str, whole: Tensor) -> None:
        """Set what the model computes with, and not the main copy."""
        self.parameters[name].copy_(whole)

    @contextmanager
    def replaced(self, part: Callable[[str], Tensor]) -> Iterator[None]:
        """The model computes with other trained weights: `part(name)` is this rank's flat piece of each.

        The optimizer must not step meanwhile. Contexts may be nested; each goes back to what was there before it.
        Collective over the data-parallel group.
        """
        outer, before = self._shown, self._shown or self._main_parts()
        self._show(part)
        try:
            yield
        finally:
            self._show(before)
            self._shown = outer

    @torch.no_grad()
    def _show(self, part: Callable[[str], Tensor]) -> None:
        for name in self.pieces:
            held = self._held(name)
            # from pinned memory on the host nobody waits for it; to the host one does
            held.copy_(part(name), non_blocking=held.device == device())
        self._complete()
        self._shown = part

    def _held(self, name: str) -> Tensor:
        """This rank's piece of what the model computes with, a flat view: the main copy in the model's type."""
        return self.pieces[name].of(self.parameters[name].detach())

    def _main_parts(self) -> Callable[[str], Tensor]:
        """The main copies by name; those that are the parameters themselves are copied, to outlive them."""
        mains = {name: piece.flat for name, piece in self.pieces.items()}
        is_same = {name: main.data_ptr() == self._held(name).data_ptr() for name, main in mains.items()}
        return {name: main.clone() if is_same[name] else main for name, main in mains.items()}.__getitem__


class KeptWeights:
    """A copy of the weights as they are now, which stays so until it is moved.

    Args:
        on_host: it lies in the memory of the host, pinned where there is a GPU.
    """

    def __init__(self, main: MainWeights, on_host: bool = False) -> None:
        self._main = main
        self.pieces = {name: _copy_of(piece.flat, on_host) for name, piece in main.pieces.items()}

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Move the copy toward the main weights, of which it has 1 - decay then; at 0 it is them."""
        for name, kept in self.pieces.items():
            current = self._main.pieces[name].flat
            here = kept.to(current.device, non_blocking=True)
            here.lerp_(current, 1.0 - decay)
            if here is not kept:
                kept.copy_(here, non_blocking=True)

    def still(self) -> dict[str, Tensor]:
        """The pieces for a checkpoint, which copies what lies on a GPU: pinned ones would change with the next step."""
        if not any(piece.is_pinned() for piece in self.pieces.values()):
            return self.pieces
        torch.cuda.current_stream().synchronize()
        return {name: piece.clone() for name, piece in self.pieces.items()}

    def value(self, name: str) -> Tensor:
        """A parameter as the model would compute with it, whole: in the model's type, and a frozen one as it is.

        Collective over the data-parallel group.
        """
        parameter = self._main.parameters[name]
        if not parameter.requires_grad:
            return self._main.value(name)
        return self._main.gather(self.pieces.__getitem__, name, parameter.dtype)

    def exact(self, name: str) -> Tensor:
        """The same in float32, as it is kept."""
        if not self._main.parameters[name].requires_grad:
            return self._main.exact(name)
        return self._main.gather(self.pieces.__getitem__, name)

    def assign(self, name: str, whole: Tensor) -> None:
        """Set this rank's piece from a whole tensor."""
        if name in self.pieces:
            self.pieces[name].copy_(self._main.pieces[name].of(whole.contiguous()))

    def swapped_in(self) -> AbstractContextManager[None]:
        """The model computes with these weights inside the context. Collective over data parallelism."""
        return self._main.replaced(self.pieces.__getitem__)


def _copy_of(flat: Tensor, on_host: bool) -> Tensor:
    if not on_host:
        return flat.float().clone()
    copy = torch.empty(flat.shape, dtype=torch.float32, device="cpu", pin_memory=flat.is_cuda)
    return copy.copy_(flat)


# in checkpoints: cut over ranks, or whole
MAIN_COPIES = ("optimizer.state.param", "optimizer.state.fp32_param")


def sharded_main_copies(model_state: dict[str, Any], held: Collection[str]) -> dict[str, Any]:
    """The main copies that a checkpoint holds of a model, by the parameters' names; without data.

    Args:
        model_state: as for `sharded_copy`.
        held: all names in the checkpoint.
    """
    found: dict[str, Any] = {}
    for prefix in MAIN_COPIES:
        copies = _copies(model_state, prefix, without_room)
        found |= {name: copy for name, copy in copies.items() if copy.key in held}
    return found


def sharded_copy(
    model_state: dict[str, Any], name: str, whole: Callable[[Parameter], Tensor]
) -> dict[str, Any]:
    """Sharded tensors like those of the model, under keys of their own and with `whole(parameter)` as data.

    Args:
        model_state: the model's sharded_state_dict, whose tensors hold the parameters themselves.
        name: of the kept copy; part of the keys.
    """
    return _copies(model_state, f"weights.{name}", whole)


def _copies(model_state: dict[str, Any], prefix: str, whole: Callable[[Parameter], Tensor]) -> dict[str, Any]:
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    parameters = [t for t in nested_values(tensors) if isinstance(t.data, Parameter)]
    return {t.key: make_sharded_optimizer_tensor(t, whole(t.data), prefix) for t in parameters}
