"""Memory that a reader process and its parent both see: tensors go through it in one copy each way.

It is a file without a name, so it grows with what is put in, and the size of /dev/shm is no limit.
"""

import math
import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes
Layout = list[tuple[str, torch.dtype, tuple[int, ...], int]]  # name, type, shape, first byte


class Slot:
    """Holds the tensors of one read; made before the fork."""

    def __init__(self) -> None:
        self._file = os.memfd_create("soar_mega reader")
        self._size = 0
        self._bytes: Tensor | None = None

    def put(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Copy tensors in, over what was there; where they lie, for the other process."""
        layout, end = [], 0
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tuple(tensor.shape), end))
            end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        if end > self._size:
            os.ftruncate(self._file, end)
        for (_, dtype, shape, first), tensor in zip(layout, tensors.values(), strict=True):
            self._view(dtype, shape, first, end).copy_(tensor)
        return layout

    def take(self, layout: Layout) -> dict[str, Tensor]:
        """Copies of the tensors that the other process put in."""
        size = os.fstat(self._file).st_size
        return {name: self._view(dtype, shape, first, size).clone() for name, dtype, shape, first in layout}

    def close(self) -> None:
        self._bytes = None
        os.close(self._file)

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...], first: int, size: int) -> Tensor:
        if self._bytes is None or self._size < size:
            self._size = size
            self._bytes = torch.frombuffer(mmap.mmap(self._file, size), dtype=torch.uint8) if size else None
        count = math.prod(shape) * dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        assert self._bytes is not None
        return self._bytes[first : first + count].view(dtype).view(shape)
