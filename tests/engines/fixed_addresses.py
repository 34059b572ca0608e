"""What stands for CUDA graphs on a CPU where addresses matter: a replay runs the recorded operations alone, on the
memory they had.

A graph repeats kernels and runs no Python. Here each torch operation that computes stands for a kernel. The memory of a
recording comes out of a pool, where what is freed is used again at once, by the same recording or a later one; so a
replay reads something else wherever what it needs is no longer there, or is not made by the replay itself.

The pools replace torch's allocator for the whole process: only for a process of its own (`run_ranks`). Not stood for:
launches of Triton kernels (without TRITON_INTERPRET they are torch operations) and collectives inside a layer.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from repeated_work import RepeatedWork
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

SOURCE = Path(__file__).with_suffix(".cpp")
POOL_BYTES = 4 * 2**20


def compile_pools(folder: Path) -> str:
    """Compile the allocator, once for all processes of a test; the path of the library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the memory of recordings was not checked")
    library = str(folder / "fixed_addresses.so")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    headers = [f"-I{path}" for path in include_paths()]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", abi, *headers, str(SOURCE), "-o", library]
    done = subprocess.run([*command, f"-L{TORCH_LIB_PATH}", "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Pool:
    """Stands for the private memory pool of some graphs.

    Attributes:
        memory: all its bytes.
    """

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.add_pool.argtypes = [ctypes.c_size_t]
        self._library.add_pool.restype = ctypes.c_void_p
        self._library.use_pool.argtypes = [ctypes.c_void_p]
        self._address = self._library.add_pool(POOL_BYTES)
        self.memory = _memory(self._address, POOL_BYTES, torch.uint8)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """New tensors come out of the pool."""
        self._library.use_pool(self._address)
        try:
            yield
        finally:
            self._library.use_pool(None)


class FixedAddresses(RepeatedWork):
    """Stands for `CudaGraphs`: a recorder with a pool of its own."""

    make_pool = Pool

    def __init__(self, library: str, engine) -> None:
        super().__init__(engine)
        self._pool = self.make_pool(library)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As with a graph, recording the work computes nothing: the pool too is left as it was."""
        before = self._pool.memory.clone()
        operations = _Operations()

        def noted_work() -> None:
            with self._pool.in_use(), operations:
                work()

        super().record(noted_work)
        self._pool.memory.copy_(before)
        return operations.replay


class _Operations(TorchDispatchMode):
    """Notes the operations that compute something, with where they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        results = _tensors(found)
        is_new = [x.untyped_storage().data_ptr() not in given for x in results]
        assert not func.name().startswith(("c10d", "_c10d")), f"{func} is a collective: not stood for"
        if any(is_new) or func._schema.is_mutable:
            fixed_args, fixed_kwargs = tree_map_only(Tensor, _same_place, (args, kwargs))
            places = [_same_place(x) if new else None for x, new in zip(results, is_new, strict=True)]

            def repeat() -> None:
                again = _tensors(func(*fixed_args, **fixed_kwargs))
                for place, result in zip(places, again, strict=True):
                    if place is not None:
                        place.copy_(result)

            self._noted.append(repeat)
        else:  # another view of a tensor, which launches nothing
            assert results, f"{func} hands a value to the host, which no graph can"
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for repeat in self._noted:
            repeat()


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _same_place(x: Tensor) -> Tensor:
    """A tensor over the same memory that does not keep it from being freed."""
    assert x.data_ptr(), "a tensor is read whose memory was freed"
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.size(), x.stride(), strict=True))
    return _memory(x.data_ptr(), elements * x.element_size(), x.dtype).as_strided(x.size(), x.stride())


def _memory(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """The `count` bytes that begin there."""
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype)
