"""What is computed again in backward, in place of being kept: whole modules, or single results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which only arguments and results are kept for the backward.

    No random generator is restored: nothing in a model draws from one.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recomputed(module: type) -> type:
    """A class of modules like `module` that compute their forward again in backward."""

    class Recomputed(module):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return run(super().forward, *args, **kwargs)

    return Recomputed


def free_until_backward(
    result: Tensor | tuple[Tensor, ...], make: Callable[..., Any], *readers: Tensor
) -> None:
    """Give back a result's memory, and have it made again when the backward comes to who read it.

    Args:
        result: one or several tensors, each with memory of its own.
        make: made it; called with `out`, it writes the same there.
        readers: made from the result, all that were; what made them may keep it.
    """
    readers = tuple(reader for reader in readers if reader.requires_grad)
    if not readers:
        return
    freed = [_Freed(result if isinstance(result, tuple) else (result,), make)]

    def restore(gradient: Tensor) -> None:
        while freed:
            freed.pop().restore()  # whose memory is then held by nothing here

    for reader in readers:
        reader.register_hook(restore)


class _Freed:
    def __init__(self, tensors: tuple[Tensor, ...], make: Callable[..., Any]) -> None:
        # to autograd, what is written to these is no change of the result
        self._tensors = tuple(x.data for x in tensors)
        self._make = make
        for x in tensors:
            assert x.untyped_storage().nbytes() == x.nbytes, "it shares its memory"
            x.untyped_storage().resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        for x in self._tensors:
            x.untyped_storage().resize_(x.nbytes)
        self._make(out=self._tensors if len(self._tensors) > 1 else self._tensors[0])
