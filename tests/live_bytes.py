"""How much memory tensors take at most, whichever allocator they come from."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the context, and keeps the most that lived at once.

    What existed before, and views of it (a file that is mapped into memory too), count nothing; nor do meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self._alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._alive.add(storage)
        self.peak = max(self.peak, self.now)
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
    return [tensor.untyped_storage() for tensor in tensors]
