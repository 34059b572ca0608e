"""What the JSON files of a folder of shards hold, checked: dataset.json, and the index beside each shard."""

import re
from pathlib import Path
from typing import Any

from soar_mega.data.json_files import read_json
from soar_mega.data.shard_writer import DATASET_FILE, FORMAT_VERSION


def read_dataset_file(folder: Path) -> dict[str, Any]:
    """dataset.json of a folder of shards. ValueError when it is not there or of another format version."""
    path = folder / DATASET_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: give the folder that `soar-mega prepare` wrote")
    if not path.is_file():
        if any(folder.glob("shard-*")):
            raise ValueError(
                f"{folder} is unfinished (no {DATASET_FILE}): run `soar-mega prepare` into it again"
            )
        raise ValueError(f"{folder} holds no shards: give a folder that `soar-mega prepare` wrote")
    values = _read_version(path)
    shards = values.get("shards")
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise ValueError(f"{path}: shards is not a list of names, samples and bytes: prepare again")
    return values


def read_index(path: Path) -> dict[str, Any]:
    """The index of a shard. ValueError naming it when it is missing, damaged or of another format version."""
    index = _read_version(path)
    samples = index.get("samples")
    cut = index.get("captions_cut", {})
    counts = [index.get("bytes"), *(cut.values() if isinstance(cut, dict) else [None])]
    if not isinstance(samples, list) or not all(type(count) is int for count in counts):
        raise ValueError(f"{path} is not the index of a shard: prepare again")
    for number, sample in enumerate(samples):
        if not _is_sample(sample):
            raise ValueError(f"{path}: its sample {number} has no name, bucket and places: prepare again")
    return index


def _read_version(path: Path) -> dict[str, Any]:
    values = read_json(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}: prepare again"
        )
    return values


def _is_shard(entry: Any) -> bool:
    """Whether an entry of dataset.json is one; its name is one that `shard_name` gives."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and re.fullmatch(r"shard-[0-9]{6,20}", entry["name"]) is not None
        and type(entry.get("samples")) is type(entry.get("bytes")) is int
    )


def _is_sample(entry: Any) -> bool:
    """Whether an entry of an index is one: offset, size and CRC-32 of each part are there."""
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("key", "name", "bucket"))
        and all(_is_place(entry.get(part)) for part in ("latents", "text"))
        and ("captions" not in entry or _are_captions(entry["captions"]))
    )


def _are_captions(value: Any) -> bool:
    """Whether each of several captions has a weight and a place."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(one, list) and _is_place(one[1:]) and _is_weight(one[0]) for one in value)
    )


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300


def _is_place(value: Any) -> bool:
    limits = (2**62, 2**62, 2**32)
    return (
        isinstance(value, list)
        and len(value) == len(limits)
        and all(type(n) is int and 0 <= n < limit for n, limit in zip(value, limits, strict=True))
    )
