"""Folders of safetensors: read by slices, written tensor by tensor (format: github.com/huggingface/safetensors)."""

import json
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soar_mega.user_files import lfs_advice, read_object

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Reader:
    """The tensors of a diffusers model folder, one file or several with an index.

    Nothing is read before it is asked for, and then only the rows and columns that are needed.

    Raises:
        ValueError: no weights, or a file that is missing or damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.files: dict[str, Path] = {}  # key -> file
        self._handles: dict[Path, Any] = {}
        for path in _weight_files(folder):
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                why = lfs_advice(path) or f"it may be truncated: {error}"
                raise ValueError(f"{path} cannot be read, {why}") from error
            self._handles[path] = handle
            self.files.update(dict.fromkeys(handle.keys(), path))

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; reads the header only."""
        return tuple(self._slice(key).get_shape())

    def read(self, key: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor, or its rows (dim 0) or columns (dim 1) start..stop."""
        if dim is None:
            return self._handles[self.files[key]].get_tensor(key)
        assert dim in (0, 1)
        part = self._slice(key)
        return part[start:stop] if dim == 0 else part[:, start:stop]

    def _slice(self, key: str) -> Any:
        return self._handles[self.files[key]].get_slice(key)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Writer:
    """Writes the tensors of a plan, in its order, into one file or several with an index.

    Args:
        plan: (key, shape) of every tensor, in the order in which `write` will get them.
        max_shard_size: bytes of tensors in one file, at least one tensor each.
    """

    def __init__(
        self, folder: Path, plan: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype, max_shard_size: int
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self._shards = _cut(plan, dtype.itemsize, max_shard_size)
        self._queue = [
            (key, shape, number) for number, shard in enumerate(self._shards) for key, shape in shard
        ]
        self._next = 0
        self._file: IO[bytes] | None = None
        self._open_shard = -1

    def write(self, key: str, tensor: Tensor) -> None:
        """Append a tensor: the next of the plan."""
        expected, shape, shard = self._queue[self._next]
        assert (key, tuple(tensor.shape), tensor.dtype) == (expected, shape, self.dtype)
        self._next += 1
        if shard != self._open_shard:
            self._start(shard)
        assert self._file is not None
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)

    def close(self) -> None:
        """Finish the last file and write the index, if there are several."""
        assert self._next == len(self._queue), "tensors of the plan are missing"
        self.abandon()
        if len(self._shards) > 1:
            keys = {key: self._name(number) for key, _, number in self._queue}
            total = sum(torch.Size(shape).numel() * self.dtype.itemsize for _, shape, _ in self._queue)
            index = {"metadata": {"total_size": total}, "weight_map": keys}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def abandon(self) -> None:
        """Close the open file, finished or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self, number: int) -> None:
        self.abandon()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key, shape in self._shards[number]:
            end = offset + torch.Size(shape).numel() * self.dtype.itemsize
            header[key] = {
                "dtype": TYPE_NAMES[self.dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self.folder / self._name(number), "wb")  # noqa: SIM115, open until the shard is full
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._open_shard = number

    def _name(self, number: int) -> str:
        if len(self._shards) == 1:
            return SINGLE
        stem = SINGLE.removesuffix(".safetensors")
        return f"{stem}-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.is_file():
            raise ValueError(
                f"{folder} holds weights twice, {SINGLE} and {INDEX}: remove the one that is not meant, which another "
                "program may load"
            )
        return [folder / SINGLE]
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX} (found: {found})")
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} is not an index of safetensors files: it has no weight_map")
    for key, name in listed.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} says that {key} is in {name!r}, which is no file beside it")
    return [folder / name for name in sorted(set(listed.values()))]


def _cut(
    plan: list[tuple[str, tuple[int, ...]]], itemsize: int, max_shard_size: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for key, shape in plan:
        nbytes = torch.Size(shape).numel() * itemsize
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append((key, shape))
        size += nbytes
    return shards
