"""Which sample comes when: a pure function of (seed, position), given how far each bucket's stream has been read.

Each aspect bucket is an endless stream of epochs, every epoch a permutation of the bucket keyed by (seed, bucket,
epoch); so within a bucket use counts never differ by more than one. The bucket of a step is drawn by size, keyed by the
number of samples consumed so far. Nothing here knows of ranks: global batch k has the same samples at any world size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soar_mega.flow import uniform

BLOCK = 1 << 16  # numbers drawn at once


@dataclass(frozen=True, kw_only=True)
class Place:
    """How far a run has read: all that a checkpoint has to keep."""

    consumed: int = 0  # samples of the whole run; the position of the next one
    streams: Mapping[str, int] = field(default_factory=dict)  # samples taken from each bucket's stream


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """`count` neighbouring samples of one bucket's stream, the first of them at `position` in the training sequence."""

    bucket: str
    first: int
    position: int
    count: int

    def part(self, index: int, parts: int) -> "Stretch":
        """The index-th of `parts` equal blocks."""
        assert self.count % parts == 0
        size = self.count // parts
        return Stretch(
            bucket=self.bucket,
            first=self.first + index * size,
            position=self.position + index * size,
            count=size,
        )

    def positions(self) -> torch.Tensor:
        """Places in the training sequence [count] int64."""
        return torch.arange(self.position, self.position + self.count)


class Order:
    """The order of a data set whose buckets hold `sizes` samples."""

    def __init__(self, seed: int, sizes: Mapping[str, int]) -> None:
        self.seed = seed
        self.sizes = {bucket: size for bucket, size in sorted(sizes.items()) if size > 0}
        if not self.sizes:
            raise ValueError("the data set is empty: no bucket holds a sample")
        self._ends = np.cumsum(list(self.sizes.values()))
        self._epochs: dict[tuple[str, int], NDArray[np.integer[Any]]] = {}

    def step(self, place: Place, count: int) -> tuple[Stretch, Place]:
        """The `count` samples that follow `place`, all of one bucket, and the place behind them."""
        bucket = self._draw_bucket(place.consumed)
        first = place.streams.get(bucket, 0)
        stretch = Stretch(bucket=bucket, first=first, position=place.consumed, count=count)
        return stretch, Place(
            consumed=place.consumed + count, streams={**place.streams, bucket: first + count}
        )

    def members(self, stretch: Stretch) -> NDArray[np.int64]:
        """Which members of the bucket (0 .. size-1) a stretch holds: [count] int64."""
        size = self.sizes[stretch.bucket]
        places = np.arange(stretch.first, stretch.first + stretch.count)
        epochs = places // size
        parts = [
            self._permutation(stretch.bucket, int(epoch))[places[epochs == epoch] % size]
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts).astype(np.int64)

    def _draw_bucket(self, consumed: int) -> str:
        draw = uniform(self.seed, "bucket", torch.tensor([consumed])).item() * self._ends[-1]
        return list(self.sizes)[int(np.searchsorted(self._ends, draw, side="right"))]

    def _permutation(self, bucket: str, epoch: int) -> NDArray[np.integer[Any]]:
        """Members of the bucket sorted by a number keyed by (seed, bucket, member, epoch)."""
        key = (bucket, epoch)
        if key not in self._epochs:
            # A batch touches neighbouring epochs; older ones are not needed again.
            self._epochs = {k: v for k, v in self._epochs.items() if k[0] != bucket or k[1] >= epoch - 1}
            numbers = np.empty(self.sizes[bucket])
            for first in range(0, len(numbers), BLOCK):
                members = torch.arange(first, min(first + BLOCK, len(numbers)))
                numbers[first : first + BLOCK] = uniform(self.seed, f"order/{bucket}", members, epoch)[:, 0]
            kind = np.min_scalar_type(len(numbers))  # an epoch of ten million is kept in 40 MB
            self._epochs[key] = np.argsort(numbers, kind="stable").astype(kind)
        return self._epochs[key]
