"""Safetensors files whose tensors are written in any order, each into its place."""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from soar_mega.convert.finite_tensors import is_finite
from soar_mega.convert.safetensors_reader import TYPES
from soar_mega.convert.weight_files import index_name, shard_name, single_name

TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
MARK = "soar-mega convert"  # of single files: who wrote them


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Writer(Protocol):
    """Where diffusers' tensors are written, in any order."""

    def write(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or as many rows of it as are given, from `row` on; each once."""

    def close(self) -> None:
        """Everything must have been written."""

    def abandon(self) -> None:
        """Close what is open, finished or not."""


class FileWriter:
    """One file. `close` it when all is written, or else `abandon` it.

    Args:
        written_by: said in its header.
    """

    def __init__(self, path: Path, plan: Iterable[Planned], written_by: str = "") -> None:
        self._planned = {tensor.key: tensor for tensor in plan}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        if written_by:
            header["__metadata__"]["written_by"] = written_by
        offsets, end = {}, 0
        for key, tensor in self._planned.items():
            offsets[key], end = end, end + tensor.nbytes
            header[key] = {
                "dtype": TYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offsets[key], end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {key: 8 + len(text) + offset for key, offset in offsets.items()}
        self._missing = end  # bytes
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write_at(0, struct.pack("<Q", len(text)) + text)

    def write(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or as many rows of it as are given, from `row` on; each once, in the planned type."""
        planned = self._planned[key]
        assert tensor.shape[1:] == planned.shape[1:]
        flat = tensor.detach().to("cpu", planned.dtype).contiguous().reshape(-1)
        if planned.dtype == torch.float16 != tensor.dtype and not is_finite(flat):
            raise ValueError(f"{key} holds numbers above 65504, which fp16 cannot: write bf16 or fp32")
        offset = row * torch.Size(planned.shape[1:]).numel() * planned.dtype.itemsize
        assert offset + flat.nbytes <= planned.nbytes
        self._write_at(self._offsets[key] + offset, flat.view(torch.uint8).numpy())
        self._missing -= flat.nbytes

    def close(self) -> None:
        """Everything must have been written."""
        assert self._missing == 0, "tensors of the plan are missing"
        self.abandon()

    def abandon(self) -> None:
        """Close the file, finished or not."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _write_at(self, offset: int, data: Any) -> None:
        assert self._handle is not None
        room = memoryview(data)
        while room:
            count = os.pwrite(self._handle, room, offset)
            room, offset = room[count:], offset + count


class FolderWriter:
    """The weights of a diffusers model folder: one file, or several with an index.

    Args:
        max_shard_size: bytes of tensors in one file, at least one tensor each.
        variant: part of the names of the files, such as fp16.
    """

    def __init__(self, folder: Path, plan: list[Planned], max_shard_size: int, variant: str = "") -> None:
        shards = _cut(plan, max_shard_size)
        names = [single_name(variant)]
        if len(shards) > 1:
            names = [shard_name(variant, number, len(shards)) for number in range(len(shards))]
            total = sum(tensor.nbytes for tensor in plan)
            keys = {tensor.key: name for name, shard in zip(names, shards) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": keys}
            (folder / index_name(variant)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        self._files = [FileWriter(folder / name, shard) for name, shard in zip(names, shards)]
        self._file = {t.key: file for file, shard in zip(self._files, shards) for t in shard}

    def write(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor of the plan, or some rows of it, from `row` on; each once."""
        self._file[key].write(key, tensor, row)

    def close(self) -> None:
        """Everything must have been written."""
        for file in self._files:
            file.close()

    def abandon(self) -> None:
        """Close the files, finished or not."""
        for file in self._files:
            file.abandon()


def _cut(plan: list[Planned], max_shard_size: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
