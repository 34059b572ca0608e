"""Random access to shards: which samples there are, and their tensors by number."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, TarInfo

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.data.captions import drawn
from soar_mega.data.compatibility import check_compatible
from soar_mega.data.info import DatasetInfo
from soar_mega.data.open_index import open_index
from soar_mega.data.sample_index import SampleIndex
from soar_mega.data.shard_files import read_dataset_file
from soar_mega.data.shard_writer import DATASET_FILE, EMPTY_FILE
from soar_mega.flow import normal

OPEN_FILES = 32  # shards kept open for reading


@dataclass(kw_only=True)
class Read:
    """Samples as they came from disk; rows of failed ones are zero."""

    tensors: dict[str, Tensor]  # latents or images, text, pooled: [B, ...]
    names: list[str]
    failures: dict[int, str] = field(default_factory=dict)  # row -> why it could not be read


class ShardSet:
    """Random access to the samples of a folder of shards. The index is opened at the first use of a sample."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._dataset = read_dataset_file(self.path)
        self.info = DatasetInfo.from_json(self._dataset, self.path / DATASET_FILE)
        self._index: SampleIndex | None = None
        self._ends = np.cumsum([shard["samples"] for shard in self._dataset["shards"]])  # of the shards
        self._files: OrderedDict[int, FileIO] = OrderedDict()

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
            self._index = open_index(self.path, self._dataset, self.info.buckets)

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
        count = len(indices)
        tensors = {"latents": torch.empty(count, *self.info.latent_shape(bucket))}
        if text:
            dtype = self.info.torch_text_dtype()
            tensors["text"] = torch.empty(count, *self.info.text_shape, dtype=dtype)
            tensors["pooled"] = torch.empty(count, self.info.pooled_size, dtype=dtype)
        result = Read(tensors=tensors, names=self.names(indices))
        for row, index in enumerate(indices):
            try:
                sample = self._decode(int(index), positions[row : row + 1], seed, text)
                _check_sample(sample, {name: values.shape[1:] for name, values in tensors.items()})
            except SampleError as error:
                result.failures[row] = str(error)
                for values in tensors.values():
                    values[row] = 0
                continue
            for name, values in tensors.items():
                values[row] = sample[name]
        return result

    def finish(self, read: Read, indices: Sequence[int], positions: Tensor, seed: int, text: bool) -> Read:
        """Nothing is left to do after `read`."""
        return read

    def stored(self, part: str, index: int, caption: int = 0) -> dict[str, Tensor]:
        """mean and std of the "latents" of a sample, or text and pooled of its "text", of whatever shape.

        Args:
            caption: which of several.

        SampleError: this sample cannot be read. ValueError: its shard cannot.
        """
        shard = self._shard_of(index)
        offset, size, checksum = self._place(part, index, caption)
        content = os.pread(self._file(shard).fileno(), size, offset)
        if len(content) < size:
            raise ValueError(f"{self._shard_path(shard)} is truncated: prepare this shard again")
        if zlib.crc32(content) != checksum:
            raise SampleError(
                f"the checksum of its {part} is wrong: the shard was damaged after it was written"
            )
        try:
            tensors = load_tensors(content)
        except SafetensorError as error:
            raise SampleError(f"its {part} are no safetensors: {error}") from error
        wanted = ("mean", "std") if part == "latents" else ("text", "pooled")
        if not tensors.keys() >= set(wanted):
            raise SampleError(
                f"its {part} hold {', '.join(tensors) or 'nothing'} instead of {', '.join(wanted)}"
            )
        return {name: tensors[name] for name in wanted}

    def captions(self, index: int) -> list[str]:
        """The captions of a sample, each of which its tar holds behind its text. ValueError where it does not."""
        return [self._caption(index, number) for number in range(len(self._opened().captions(index)) or 1)]

    def _caption(self, index: int, number: int) -> str:
        shard = self._shard_of(index)
        offset, size, _ = self._place("text", index, number)
        start = offset + -(-size // BLOCKSIZE) * BLOCKSIZE
        try:
            member = TarInfo.frombuf(
                os.pread(self._file(shard).fileno(), BLOCKSIZE, start), "utf-8", "strict"
            )
            content = os.pread(self._file(shard).fileno(), member.size, start + BLOCKSIZE)
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
        """The first `count` samples as lists of at most `size` indices, each list of one bucket (for `batch`)."""
        first = range(min(count, len(self)))
        groups = []
        for bucket in sorted(self.info.buckets):
            members = [i for i in first if self.bucket_of(i) == bucket]
            groups += [members[i : i + size] for i in range(0, len(members), size)]
        return groups

    def _decode(self, index: int, position: Tensor, seed: int, text: bool) -> dict[str, Tensor]:
        latents = self.stored("latents", index)
        mean, std = latents["mean"], latents["std"]
        if mean.shape != std.shape:
            raise SampleError(f"its latents have means {tuple(mean.shape)} and deviations {tuple(std.shape)}")
        sample = {"latents": mean + std * normal(seed, "vae", position, 0, mean.shape)[0]}
        if not text:
            return sample
        weights = [weight for weight, *_ in self._opened().captions(index)]
        return {**sample, **self.stored("text", index, drawn(weights, seed, position) if weights else 0)}

    def _place(self, part: str, index: int, caption: int) -> tuple[int, int, int]:
        if caption == 0:
            return self._opened().place(part, index)
        _, *place = self._opened().captions(index)[caption]
        return place[0], place[1], place[2]

    def _file(self, shard: int) -> FileIO:
        """A shard's open file; the least recently used one is closed when too many are open."""
        if shard not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            try:
                self._files[shard] = FileIO(self._shard_path(shard))
            except OSError as error:
                raise ValueError(f"cannot open shard {self._shard_path(shard)}: {error.strerror}") from error
        self._files.move_to_end(shard)
        return self._files[shard]

    def _shard_path(self, shard: int) -> Path:
        return self.path / f"{self._dataset['shards'][shard]['name']}.tar"

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int) -> str:
        key, name = self._opened().key_and_name(index)
        return f"{name} ({self._shard_path(self._shard_of(index)).name}, {key})"

    def _opened(self) -> SampleIndex:
        self.open()
        assert self._index is not None
        return self._index


class SampleError(Exception):
    """One sample cannot be read; the others can."""


def open_shards(path: str | Path, pipeline_dir: str = "") -> ShardSet:
    """The shards in `path`, checked to be complete and, where a pipeline folder is given, to come from its encoders.

    ValueError naming the file that is missing, truncated or of another format version, or the encoder that differs.
    """
    shards = ShardSet(path)
    shards.open()
    check_compatible(shards.info, str(path), pipeline_dir)
    return shards


def _check_sample(sample: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        if sample[name].shape != shape:
            raise SampleError(f"its {name} have shape {tuple(sample[name].shape)} instead of {tuple(shape)}")
        # One pass; a sum can also be infinite because finite numbers are large.
        if not sample[name].sum().isfinite() and not sample[name].isfinite().all():
            raise SampleError(f"its {name} hold NaN or infinite numbers")
