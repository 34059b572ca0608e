"""A rank's part of a tensor in a checkpoint, as it lies in an optimizer: saving gathers nothing and copies nothing.

An optimizer that is cut over data parallelism owns runs of elements of the flattened tensors. A checkpoint knows boxes
of whole tensors, so a run becomes a few of them; loading puts together whatever boxes it finds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size


@dataclass(frozen=True)
class SavedPiece:
    """A run of elements of a tensor.

    Attributes:
        key: the tensor's name in the checkpoint.
        flat: [n], the elements; shared with what they are a part of.
        start: the place of the first one in this tensor-parallel rank's flattened shard of the tensor.
        shard: of that rank: its shape, its offset, and the shape of the whole tensor.
    """

    key: str
    flat: Tensor
    start: int
    shard: ShardedTensor

    def boxes(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Offsets in the whole tensor, and the elements there in the shape of a box."""
        done = 0
        for offset, size in boxes(self.start, self.start + self.flat.numel(), self.shard.local_shape):
            count = math.prod(size)
            place = tuple(base + more for base, more in zip(self.shard.global_offset, offset, strict=True))
            yield place, self.flat[done : done + count].view(size)
            done += count


@dataclass(frozen=True)
class UnreadTensor:
    """A whole tensor that is not there until it is written.

    Attributes:
        key: its name in the checkpoint.
        read: gives it.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Cuts the elements start..stop of a row-major tensor into boxes, in the order of the elements."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    row, first = divmod(start, inner)
    if first:  # the end of a row
        end = min(stop, (row + 1) * inner)
        yield from _in_row(row, first, end - row * inner, shape)
        start, row = end, row + 1
    rows = (stop - start) // inner
    if rows > 0:
        yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
        start += rows * inner
    if start < stop:  # the beginning of a row
        row = start // inner
        yield from _in_row(row, 0, stop - row * inner, shape)


def _in_row(row: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    for offset, size in boxes(start, stop, shape[1:]):
        yield (row, *offset), (1, *size)
