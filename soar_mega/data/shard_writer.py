"""Shards: tar files that the webdataset library reads too, with an index each for random access.

A folder of shards holds

    shard-000000.tar     per sample KEY.latents.safetensors (mean, std), KEY.text.safetensors (text, pooled), KEY.txt
                         (the caption) and KEY.json (name in the source, bucket); KEY.1.text.safetensors, KEY.1.txt and
                         so on for further captions
    shard-000000.json    its index: offset, size and CRC-32 of each part, written when the tar is complete
    index.bin            the same of all shards, as training reads it
    empty.safetensors    text and pooled of the empty prompt
    dataset.json         format version, shapes, buckets, encoders, shards, CRC-32 of index.bin and empty.safetensors; a
                         folder without it is unfinished
"""

import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from soar_mega.data.info import DatasetInfo
from soar_mega.data.json_files import read_json, write_bytes, write_json
from soar_mega.data.sample_index import INDEX_FILE, index_content

FORMAT_VERSION = 2
DATASET_FILE = "dataset.json"
EMPTY_FILE = "empty.safetensors"


@dataclass(frozen=True, kw_only=True)
class EncodedCaption:
    """A caption after the text encoders."""

    caption: str
    weight: float = 1.0  # against other captions of the image
    text: Tensor  # [S, D]
    pooled: Tensor  # [P]


@dataclass(frozen=True, kw_only=True)
class EncodedSample(EncodedCaption):
    """One image after the VAE, with its first caption."""

    name: str  # in the source
    bucket: str
    latent_mean: Tensor  # [C, H, W] float32, scaled as the transformer expects
    latent_std: Tensor  # [C, H, W] float32
    further: Sequence[EncodedCaption] = ()  # other captions of the image


class ShardWriter:
    """Writes one shard: the tar under a temporary name, then its final name, then the index."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = shard_name(number)
        self._path = folder / f"{self.name}.tar"
        self._temporary = folder / f"{self.name}.tar.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 closed by close
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._samples: list[dict[str, Any]] = []

    def add(self, key: str, sample: EncodedSample) -> None:
        """Append a sample. `key` is unique in the data set, holds no dot and sorts as the source does."""
        latents = save({"mean": sample.latent_mean.contiguous(), "std": sample.latent_std.contiguous()})
        entry: dict[str, Any] = {"key": key, "name": sample.name, "bucket": sample.bucket}
        description = json.dumps({"name": sample.name, "bucket": sample.bucket}, sort_keys=True)
        entry["latents"] = self._append(f"{key}.latents.safetensors", latents)
        entry["text"] = self._append_caption(key, sample)
        self._append(f"{key}.json", description.encode())
        if sample.further:
            entry["captions"] = [[sample.weight, *entry["text"]]]
        for number, one in enumerate(sample.further, start=1):
            entry["captions"].append([one.weight, *self._append_caption(f"{key}.{number}", one)])
        self._samples.append(entry)

    def close(self, **extra: Any) -> None:
        """Complete the shard; `extra` goes into its index."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._samples.sort(key=lambda sample: sample["key"])
        size = self._temporary.stat().st_size
        os.replace(self._temporary, self._path)
        index = {"format_version": FORMAT_VERSION, "bytes": size, "samples": self._samples, **extra}
        write_json(self._path.with_suffix(".json"), index)

    def _append_caption(self, stem: str, one: EncodedCaption) -> list[int]:
        """The place of the embeddings, behind which the caption itself follows."""
        text = save({"text": one.text.contiguous(), "pooled": one.pooled.contiguous()})
        place = self._append(f"{stem}.text.safetensors", text)
        self._append(f"{stem}.txt", one.caption.encode())
        return place

    def _append(self, name: str, content: bytes) -> list[int]:
        # Short ASCII names: the header is one block, and nothing in it depends on when or by whom it was written.
        offset = self._tar.offset + tarfile.BLOCKSIZE
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, BytesIO(content))
        return [offset, len(content), zlib.crc32(content)]


def write_dataset_file(folder: Path, info: DatasetInfo, shards: int, **extra: Any) -> None:
    """dataset.json over the first `shards` complete shards of the folder: the data set is finished by this."""
    listed: list[dict[str, Any]] = []

    def samples() -> Iterator[list[dict[str, Any]]]:
        for number in range(shards):
            index = read_json(folder / f"{shard_name(number)}.json")
            listed.append(
                {"name": shard_name(number), "samples": len(index["samples"]), "bytes": index["bytes"]}
            )
            yield index["samples"]

    index = index_content(samples())
    write_bytes(folder / INDEX_FILE, index)
    checksum = zlib.crc32((folder / EMPTY_FILE).read_bytes())
    values = {
        "format_version": FORMAT_VERSION,
        "empty_crc32": checksum,
        "index_crc32": zlib.crc32(index),
        **info.to_json(),
        "shards": listed,
        **extra,
    }
    write_json(folder / DATASET_FILE, values)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"
