"""Tensors of safetensors files, read when they are asked for (format: github.com/huggingface/safetensors).

Files are read and not mapped, so that what a process takes is what it has asked for.
"""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soar_mega.convert.weight_files import weight_files
from soar_mega.user_files import lfs_advice

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 2**26  # bytes that are read at a time where a part of a tensor is enough


@dataclass(frozen=True)
class _Place:
    file: Path
    type_name: str
    shape: tuple[int, ...]
    offset: int  # in bytes from the beginning of the file


@contextmanager
def open_file(file: Path) -> Iterator[safe_open]:
    """A safetensors file, whose header has been compared with its length.

    Raises:
        ValueError: it is missing or damaged, or reading it fails; names it.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        why = lfs_advice(file) or f"it may be truncated: {error}"
        raise ValueError(f"{file} cannot be read, {why}") from error


class Reader:
    """The tensors of a diffusers model folder, or of one file.

    Nothing is read before it is asked for, and then only the rows and columns that are needed.

    Attributes:
        files: by key, where a tensor is.

    Raises:
        ValueError: no weights, or a file that is missing or damaged; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._places: dict[str, _Place] = {}
        self._handles: dict[Path, int] = {}
        for file in weight_files(path):
            for key, place in _places(file).items():
                if key in self._places:
                    raise ValueError(f"{key} is in {self._places[key].file} and again in {file.name}")
                self._places[key] = place
            self._handles[file] = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, self._handles[file])
        self.files = {key: place.file for key, place in self._places.items()}

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._places[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor's numbers. ValueError: it is none of weights, as in other parts of a pipeline's file."""
        place = self._places[key]
        if place.type_name not in TYPES:
            raise ValueError(f"{place.file}: {key} holds {place.type_name}; weights are fp32, bf16 or fp16")
        return TYPES[place.type_name]

    def read(self, key: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor, or its rows (dim 0) or columns (dim 1) start..stop."""
        place = self._places[key]
        if dim is None:
            return self._rows(place, 0, place.shape[0]) if place.shape else self._rows(place, 0, 1)[0]
        assert dim in (0, 1)
        return self._rows(place, start, stop) if dim == 0 else self._columns(key, start, stop)

    def blocks(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The rows start..stop of a tensor, a few at a time, each with the number of the first."""
        place = self._places[key]
        step = max(1, BLOCK // max(1, _row_bytes(place)))
        stop = place.shape[0] if stop is None else stop
        for first in range(start, stop, step):
            yield first, self._rows(place, first, min(first + step, stop))

    def _columns(self, key: str, start: int, stop: int) -> Tensor:
        place = self._places[key]
        columns = torch.empty(place.shape[0], stop - start, *place.shape[2:], dtype=TYPES[place.type_name])
        for first, rows in self.blocks(key):
            columns[first : first + len(rows)] = rows[:, start:stop]
        return columns

    def _rows(self, place: _Place, start: int, stop: int) -> Tensor:
        tensor = torch.empty(stop - start, *place.shape[1:], dtype=TYPES[place.type_name])
        room = tensor.reshape(-1).view(torch.uint8).numpy().data
        offset = place.offset + start * _row_bytes(place)
        while room:
            count = os.preadv(self._handles[place.file], [room], offset)
            if count == 0:
                raise ValueError(f"{place.file} cannot be read, it has become shorter")
            room, offset = room[count:], offset + count
        return tensor

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _row_bytes(place: _Place) -> int:
    return torch.Size(place.shape[1:]).numel() * TYPES[place.type_name].itemsize


def _places(file: Path) -> dict[str, _Place]:
    """Where the tensors of a file are, by its header."""
    with open_file(file), open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        key: _Place(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
    }
