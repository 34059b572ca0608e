"""What a rank's memory holds: weights, gradients, optimizer states, kept copies, and the rest, which comes and goes.

With CUDA graphs that is what recordings hold: activations, inputs and outputs, in memory that stays.
"""

import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from soar_mega.engines.engine import Engine

Json = dict[str, Any]


def now() -> int:
    """Bytes of this process: that the GPU's allocator has given out, or that are resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = int(os.pread(_statm(), 100, 0).split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held_by_graphs() -> int:
    """Bytes that no tensor has and replays of CUDA graphs write to: `now` counts them as free, from a recording on."""
    if not torch.cuda.is_available():
        return 0
    pools = [
        segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)
    ]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in pools)


@functools.cache
def _statm() -> int:
    """Opened once, for it is read at the end of each span."""
    return os.open("/proc/self/statm", os.O_RDONLY)


def by_kind(engine: Engine) -> dict[str, int]:
    """Bytes of what stays from step to step; storage that two kinds share counts for the first of them."""
    seen: set[int] = set()
    kinds = {
        "weights": _weights(engine),
        "gradients": _gradients(engine),
        "optimizer": _optimizer(engine),
        "kept weights": (piece for kept in engine.weights.values() for piece in kept.pieces.values()),
    }
    return {kind: _bytes(tensors, seen) for kind, tensors in kinds.items()}


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def _weights(engine: Engine) -> Iterator[Any]:
    for parameter in engine.model.parameters():
        yield getattr(parameter, "ds_tensor", parameter)  # with ZeRO-3 a part
    yield from engine.model.buffers()


def _gradients(engine: Engine) -> Iterator[Any]:
    for parameter in engine.model.parameters():
        yield getattr(parameter, "main_grad", None)
        yield parameter.grad


def _optimizer(engine: Engine) -> Iterator[Any]:
    optimizer: Any = engine.optimizer  # type: ignore[attr-defined]  # both engines have one
    for one in [each.optimizer for each in getattr(optimizer, "chained_optimizers", [])] or [optimizer]:
        for group in one.param_groups:
            yield from group["params"]
        for state in one.state.values():
            yield from state.values()
