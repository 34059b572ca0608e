"""How the tensors of a sample lie in its shard: all of a bucket lie alike, and are read to where they are wanted."""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from soar_mega.data.sample_index import PartPlace

LENGTH_BYTES = 8  # of a safetensors file: how long its header is


class Pattern:
    """The bytes before the tensors of a safetensors file, and the order of these.

    Args:
        content: a whole file, with these tensors and no others.
    """

    def __init__(self, content: bytes, names: Mapping[str, Tensor]) -> None:
        start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        self._header = content[:start]
        places = json.loads(content[LENGTH_BYTES:start])
        self._order = sorted(names, key=lambda name: places[name]["data_offsets"])

    def read(self, file: int, place: PartPlace, rows: Mapping[str, Tensor]) -> bool:
        """Whether the file at `place` is whole and like this one; then `rows` hold its tensors.

        Args:
            file: a descriptor.
            rows: of the types and shapes that the tensors of the pattern have.
        """
        offset, size, checksum = place
        header = bytearray(len(self._header))
        parts: list[Any] = [header, *(rows[name].view(torch.uint8).numpy().data for name in self._order)]
        if os.preadv(file, parts, offset) != size:
            return False
        found = 0
        for part in parts:
            found = zlib.crc32(part, found)
        return found == checksum and header == self._header
