"""Random access to shards: which samples there are, and their tensors by number."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from soar_mega.data import batch_memory
from soar_mega.data.batch import Batch
from soar_mega.data.captions import drawn
from soar_mega.data.compatibility import check_compatible
from soar_mega.data.info import DatasetInfo
from soar_mega.data.open_index import open_index
from soar_mega.data.pattern import Pattern
from soar_mega.data.remote import remote_folder
from soar_mega.data.sample_index import PartPlace, SampleIndex
from soar_mega.data.shard_bytes import ShardBytes
from soar_mega.data.shard_cache import GIGABYTE, ShardCache
from soar_mega.data.shard_files import read_dataset_file
from soar_mega.data.shard_writer import DATASET_FILE, EMPTY_FILE
from soar_mega.flow import normal

PARTS = {"latents": ("mean", "std"), "text": ("text", "pooled")}  # the tensors of a sample's files


@dataclass(kw_only=True)
class Read:
    """Samples as they came from disk; rows of failed ones are zero."""

    tensors: dict[str, Tensor]  # latents or images, text, pooled: [B, ...]
    names: list[str]
    failures: dict[int, str] = field(default_factory=dict)  # row -> why it could not be read
    indices: Sequence[int] = ()  # in the data set

    def pin_memory(self) -> "Read":
        """In memory that a GPU reads from; torch's DataLoader asks for it by this name."""
        return replace(self, tensors={name: values.pin_memory() for name, values in self.tensors.items()})


class ShardSet:
    """Random access to the samples of a folder of shards. The index is opened at the first use of a sample.

    Args:
        path: the folder.
        cache: what that is where the shards are elsewhere; then they need not be in it.
    """

    def __init__(self, path: str | Path, cache: ShardCache | None = None) -> None:
        self.path = Path(path)
        self._is_remote = cache is not None
        self._dataset = read_dataset_file(self.path)
        self.info = DatasetInfo.from_json(self._dataset, self.path / DATASET_FILE)
        self._index: SampleIndex | None = None
        self._ends = np.cumsum([shard["samples"] for shard in self._dataset["shards"]])  # of the shards
        self._shards = ShardBytes(self.path, [shard["name"] for shard in self._dataset["shards"]], cache)
        self._patterns: dict[tuple[str, torch.Size], Pattern] = {}  # by part, and shape of its first tensor

    def __len__(self) -> int:
        return self.info.samples

    @property
    def shard_count(self) -> int:
        return len(self._dataset["shards"])

    @property
    def total_bytes(self) -> int:
        """Of all shards."""
        return sum(shard["bytes"] for shard in self._dataset["shards"])

    @property
    def captions_cut(self) -> dict[str, int]:
        """Text encoder -> captions that it took the beginning of, as far as that was counted."""
        counted = self._dataset.get("captions_cut")
        return counted if isinstance(counted, dict) else {}

    def open(self) -> None:
        """Map the index and check that every shard is there and whole. ValueError naming the file otherwise."""
        if self._index is None:
            self._index = open_index(self.path, self._dataset, self.info.buckets, is_remote=self._is_remote)

    def bucket_of(self, index: int) -> str:
        """The bucket of sample `index`."""
        return self._opened().bucket_of(index)

    def members(self, bucket: str) -> NDArray[np.uint32]:
        """Indices of the samples of a bucket, in source order."""
        return self._opened().members(bucket)

    def names(self, indices: Sequence[int]) -> list[str]:
        """Source name and place of samples, for messages."""
        return [self._name(int(index)) for index in indices]

    def read(
        self, bucket: str, indices: Sequence[int], positions: Tensor, seed: int, text: bool = True
    ) -> Read:
        """Samples `indices` of one bucket; latents, and one of several captions, are drawn for `positions` [B] int64.

        A sample that cannot be read is reported in `failures`; a shard that cannot is a ValueError.
        """
        count, shape = len(indices), self.info.latent_shape(bucket)
        tensors = {"latents": batch_memory.empty((count, *shape), torch.float32)}
        if text:
            dtype = self.info.torch_text_dtype()
            tensors["text"] = batch_memory.empty((count, *self.info.text_shape), dtype)
            tensors["pooled"] = batch_memory.empty((count, self.info.pooled_size), dtype)
        result = Read(tensors=tensors, names=self.names(indices), indices=indices)
        distribution = {"mean": torch.empty(shape), "std": torch.empty(shape)}
        for row, index in enumerate(indices):
            rows = {name: values[row] for name, values in tensors.items()}
            try:
                self._read_part("latents", int(index), self._place("latents", int(index)), distribution)
                noise = normal(seed, "vae", positions[row : row + 1], 0, shape)[0]
                torch.add(distribution["mean"], noise.mul_(distribution["std"]), out=rows["latents"])
                if text:
                    place = self._drawn_place(int(index), positions[row : row + 1], seed)
                    self._read_part("text", int(index), place, {name: rows[name] for name in PARTS["text"]})
                _check_finite(rows)
            except SampleError as error:
                result.failures[row] = str(error)
                for values in rows.values():
                    values.zero_()
        return result

    def finish(self, read: Read, positions: Tensor, seed: int, text: bool) -> Read:
        """Nothing is left to do after `read`."""
        return read

    def stored(self, part: str, index: int, caption: int = 0) -> dict[str, Tensor]:
        """mean and std of the "latents" of a sample, or text and pooled of its "text", of whatever shape.

        Args:
            caption: which of several.

        SampleError: this sample cannot be read. ValueError: its shard cannot.
        """
        return _tensors(part, self._content(part, index, self._place(part, index, caption)))

    def captions(self, index: int) -> list[str]:
        """The captions of a sample, each of which its tar holds behind its text. ValueError where it does not."""
        return [self._caption(index, number) for number in range(len(self._opened().captions(index)) or 1)]

    def _caption(self, index: int, number: int) -> str:
        shard = self._shard_of(index)
        offset, size, _ = self._place("text", index, number)
        start = offset + -(-size // BLOCKSIZE) * BLOCKSIZE
        try:
            member = TarInfo.frombuf(self._shards.read(shard, start, BLOCKSIZE), "utf-8", "strict")
            content = self._shards.read(shard, start + BLOCKSIZE, member.size)
            if not member.name.endswith(".txt"):
                raise ValueError(f"{member.name} is in its place")
            return content.decode()
        except (HeaderError, ValueError) as error:
            raise ValueError(
                f"the caption of {self._name(index)} cannot be read ({error}): prepare this shard again"
            ) from error

    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """text [S, D] and pooled [P] of the empty prompt."""
        path = self.path / EMPTY_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: prepare the shards again")
        content = path.read_bytes()
        if zlib.crc32(content) != self._dataset.get("empty_crc32"):
            raise ValueError(f"{path} was damaged after it was written: copy it again or prepare again")
        try:
            tensors = load_tensors(content)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read, prepare the shards again: {error}") from error
        shapes = {"text": self.info.text_shape, "pooled": (self.info.pooled_size,)}
        for name, shape in shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise ValueError(f"{path} holds no {name} of shape {shape}: prepare the shards again")
        return tensors["text"], tensors["pooled"]

    def batch(self, indices: Sequence[int], seed: int) -> Batch:
        """Samples of one bucket as a batch on the CPU; a sample's position is its index.

        ValueError when a sample is unreadable or of another bucket than the first.
        """
        bucket = self.bucket_of(int(indices[0]))
        others = [i for i in indices if self.bucket_of(int(i)) != bucket]
        if others:
            raise ValueError(
                f"samples {indices[0]} and {others[0]} are not of one bucket: use one_bucket_groups"
            )
        positions = torch.tensor([int(i) for i in indices])
        read = self.read(bucket, indices, positions, seed)
        if read.failures:
            row, why = next(iter(read.failures.items()))
            raise ValueError(f"cannot read {read.names[row]}: {why}")
        empty_text, empty_pooled = self.empty_prompt()
        return Batch(
            seed=seed,
            position=positions,
            valid=torch.ones(len(indices), dtype=torch.bool),
            latent_shape=self.info.latent_shape(bucket),
            text_length=self.info.text_shape[0],
            empty_text=empty_text,
            empty_pooled=empty_pooled,
            names=read.names,
            latents=read.tensors["latents"],
            text=read.tensors["text"],
            pooled=read.tensors["pooled"],
        )

    def one_bucket_groups(self, count: int, size: int) -> list[list[int]]:
        """`count` samples, spread over all, as lists of at most `size` indices, each of one bucket (for `batch`)."""
        chosen = spread(range(len(self)), count)
        groups = []
        for bucket in sorted(self.info.buckets):
            members = [i for i in chosen if self.bucket_of(i) == bucket]
            groups += [members[i : i + size] for i in range(0, len(members), size)]
        return groups

    def _read_part(self, part: str, index: int, place: PartPlace, rows: Mapping[str, Tensor]) -> None:
        """Puts the tensors of a part of a sample into `rows`; SampleError where it cannot be read."""
        like = part, next(iter(rows.values())).shape
        if like in self._patterns:
            file = self._shards.file(self._shard_of(index))
            if file is not None and self._patterns[like].read(file, place, rows):
                return
        content = self._content(part, index, place)
        tensors = _tensors(part, content)
        for name, values in rows.items():
            shape = tensors[name].shape
            if shape != values.shape:
                raise SampleError(
                    f"its {part} ({name}) have shape {tuple(shape)} instead of {tuple(values.shape)}"
                )
            values.copy_(tensors[name])
        if all(tensors[name].dtype == values.dtype for name, values in rows.items()):
            self._patterns[like] = Pattern(content, rows)

    def _drawn_place(self, index: int, position: Tensor, seed: int) -> PartPlace:
        """Of the caption that a sample has at a position [1] of the training sequence."""
        captions = self._opened().captions(index)
        if not captions:
            return self._place("text", index)
        return captions[drawn([weight for weight, _ in captions], seed, position)][1]

    def _place(self, part: str, index: int, caption: int = 0) -> PartPlace:
        if caption == 0:
            return self._opened().place(part, index)
        return self._opened().captions(index)[caption][1]

    def _content(self, part: str, index: int, place: PartPlace) -> bytes:
        """A part of a sample as it was written."""
        shard = self._shard_of(index)
        offset, size, checksum = place
        content = self._shards.read(shard, offset, size)
        is_whole = zlib.crc32(content) == checksum
        if not is_whole and self._shards.drop_copy(shard):
            content = self._shards.read(shard, offset, size)
            is_whole = zlib.crc32(content) == checksum
        if len(content) < size:
            raise ValueError(f"{self._shards.path(shard)} is truncated: prepare this shard again")
        if not is_whole:
            raise SampleError(
                f"the checksum of its {part} is wrong: the shard was damaged after it was written"
            )
        return content

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int) -> str:
        key, name = self._opened().key_and_name(index)
        return f"{name} ({self._shards.path(self._shard_of(index)).name}, {key})"

    def _opened(self) -> SampleIndex:
        self.open()
        assert self._index is not None
        return self._index


def spread(members: Sequence[int] | NDArray[Any], count: int) -> list[int]:
    """At most `count` of these, evenly spread over all of them: sources lie in the order of their names or kinds."""
    take = min(count, len(members))
    return [int(members[i * len(members) // take]) for i in range(take)]


class SampleError(Exception):
    """One sample cannot be read; the others can."""


def find_shards(path: str | Path, cache_dir: str = "", cache_gb: float = 0.0) -> ShardSet:
    """The shards in a folder, or behind a url or a command with what is in `cache_dir` of them, at most `cache_gb`.

    ValueError naming what cannot be read.
    """
    remote = remote_folder(str(path))
    if remote is None:
        return ShardSet(path)
    if not cache_dir:
        raise ValueError(
            f"{path} is not on this machine: name a folder of a disk that is in data.cache_dir, for its index and as "
            "many of its shards as data.cache_gb lets in"
        )
    cache = ShardCache(remote, str(path), Path(cache_dir), int(cache_gb * GIGABYTE))
    return ShardSet(cache.path, cache)


def open_shards(
    path: str | Path, pipeline_dir: str = "", cache_dir: str = "", cache_gb: float = 0.0
) -> ShardSet:
    """The shards in `path`, checked to be complete and, where a pipeline folder is given, to come from its encoders.

    ValueError naming the file that is missing, truncated or of another format version, or the encoder that differs.
    """
    shards = find_shards(path, cache_dir, cache_gb)
    shards.open()
    check_compatible(shards.info, str(path), pipeline_dir)
    return shards


def _tensors(part: str, content: bytes) -> dict[str, Tensor]:
    """What a part of a sample holds; SampleError where that is something else."""
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise SampleError(f"its {part} are no safetensors: {error}") from error
    wanted = PARTS[part]
    if not tensors.keys() >= set(wanted):
        raise SampleError(f"its {part} hold {', '.join(tensors) or 'nothing'} instead of {', '.join(wanted)}")
    return {name: tensors[name] for name in wanted}


def _check_finite(sample: Mapping[str, Tensor]) -> None:
    for name, values in sample.items():
        # One pass; a sum can also be infinite because finite numbers are large.
        if not values.sum().isfinite() and not values.isfinite().all():
            raise SampleError(f"its {name} hold NaN or infinite numbers")
