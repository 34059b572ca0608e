"""How much memory tensors take at most, whichever allocator they come from."""

import weakref
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the context, and keeps the most that lived at once.

    What existed before, and views of it (a file that is mapped into memory too), count nothing; nor do meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # of the storages that are counted
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._count(storage._cdata, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _count(self, storage: int, size: int) -> None:
        self.now += size - self._sizes.get(storage, 0)
        self._sizes[storage] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage, 0)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
    return [tensor.untyped_storage() for tensor in tensors]
