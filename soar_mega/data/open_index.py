"""The index of a shard set as a rank opens it: mapped where the file fits the set, else made anew and kept."""

import logging
import mmap
import os
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from soar_mega.data.json_files import json_bytes
from soar_mega.data.sample_index import INDEX_FILE, SampleIndex, index_content
from soar_mega.data.shard_files import read_index
from soar_mega.data.shard_writer import DATASET_FILE

log = logging.getLogger(__name__)

BLOCK = 1 << 24  # bytes read at once


def open_index(
    folder: Path, dataset: Mapping[str, Any], buckets: Mapping[str, int], is_remote: bool = False
) -> SampleIndex:
    """Of the shards that `dataset` lists, each of which must be there and whole.

    Args:
        is_remote: the shards are elsewhere; the index is here, and was compared with `dataset` as it came.
        dataset: what dataset.json of the folder holds.
        buckets: name -> samples, as it counts them.

    Raises:
        ValueError: a shard is missing or truncated, or another file does not belong to it; naming the file.
    """
    if not is_remote:
        for shard in dataset["shards"]:
            _check_shard(folder, shard)
    index = _map(folder / INDEX_FILE) if is_remote else _mapped(folder, dataset)
    if index is None:
        content = index_content(_samples(folder, dataset))
        _check_counts(folder, dataset, buckets, SampleIndex(content))
        index = _keep(folder, dataset, content)
    _check_counts(folder, dataset, buckets, index)
    return index


def _check_shard(folder: Path, shard: Mapping[str, Any]) -> None:
    path = folder / f"{shard['name']}.tar"
    try:
        size = path.stat().st_size  # the one question about a shard: all ranks ask it of all
    except FileNotFoundError as error:
        raise ValueError(f"shard {path} is missing: copy it again or prepare again") from error
    if size != shard["bytes"]:
        raise ValueError(
            f"shard {path} has {size} bytes, not {shard['bytes']}: copy it again or prepare again"
        )


def _samples(folder: Path, dataset: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Of each shard, as its own index has them."""
    for shard in dataset["shards"]:
        path = folder / f"{shard['name']}.json"
        samples: list[dict[str, Any]] = read_index(path)["samples"]
        if len(samples) != shard["samples"]:
            raise ValueError(f"{path} does not belong to this {DATASET_FILE}: prepare again")
        yield samples


def _check_counts(
    folder: Path, dataset: Mapping[str, Any], buckets: Mapping[str, int], index: SampleIndex
) -> None:
    if index.buckets != buckets or len(index) != sum(shard["samples"] for shard in dataset["shards"]):
        raise ValueError(
            f"{folder / DATASET_FILE} counts {buckets}, the shards hold {index.buckets}: prepare again"
        )


def _keep(folder: Path, dataset: Mapping[str, Any], content: bytes) -> SampleIndex:
    """Write an index that was made anew beside the shards, where that is allowed: the next one opens it."""
    dataset = {**dataset, "index_crc32": zlib.crc32(content)}
    try:
        _replace(folder / INDEX_FILE, content)
        _replace(folder / DATASET_FILE, json_bytes(dataset))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): every reading process makes it for itself, which takes memory",
            folder / INDEX_FILE,
            error.strerror,
        )
    return _mapped(folder, dataset) or SampleIndex(content)


def _mapped(folder: Path, dataset: Mapping[str, Any]) -> SampleIndex | None:
    """The file in a folder of shards; None when there is none, or not the one that dataset.json names."""
    path = folder / INDEX_FILE
    if not path.is_file() or checksum_of(path) != dataset.get("index_crc32"):
        return None
    return _map(path)


def _map(path: Path) -> SampleIndex:
    with open(path, "rb") as file:
        return SampleIndex(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def checksum_of(path: Path) -> int:
    """CRC-32 of a file; read, for what is read through a map counts as memory of this process."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step. Ranks may all do so at once: each goes through a file of its own."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
