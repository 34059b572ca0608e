"""Memory for a batch, used again: to be handed it by the system takes as long as reading into it."""

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from soar_mega.private_names import shared_storage

_free: dict[int, list[mmap.mmap]] = {}  # by size


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU that holds anything; shared with the parent in a process of torch's DataLoader.

    ValueError: there is not enough memory to share.
    """
    size = math.prod(shape) * dtype.itemsize
    if get_worker_info() is not None:
        try:
            storage = shared_storage(size)  # in which it travels; from elsewhere it would be copied there
        except RuntimeError as error:
            raise ValueError(
                f"there is no room for a batch of reader processes ({error}): give the container a larger /dev/shm "
                "(docker: --shm-size or --ipc=host), or lower data.num_workers"
            ) from error
        return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))
    free = _free.setdefault(size, [])
    memory = free.pop() if free else _map(size)
    view = np.frombuffer(memory, np.uint8)
    weakref.finalize(view, free.append, memory)  # when no tensor is left that looks into it
    return torch.from_numpy(view).view(dtype).view(tuple(shape))


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
