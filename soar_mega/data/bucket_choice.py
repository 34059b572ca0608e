"""Which of the possible buckets a set of images gets: those that fit its own shapes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from soar_mega.data.buckets import shape
from soar_mega.data.info import bucket_size


def choose_buckets(
    shapes: NDArray[np.float64], candidates: Sequence[str], count: int | None, least: int
) -> list[str]:
    """Some of the candidates, in their order.

    Args:
        shapes: `buckets.shape` of each image.
        count: how many at most, chosen so that the least is cut off the images; None: all.
        least: images that a bucket must be nearest to; smaller ones go, the smallest first, until only one is left.
    """
    line = _by_shape(candidates)
    chosen = _fitting(_nearest(shapes, line), line, count) if count else line
    while len(chosen) > 1:
        sizes = _nearest(shapes, chosen)
        smallest = int(sizes.argmin())
        if sizes[smallest] >= least:
            break
        chosen = chosen[:smallest] + chosen[smallest + 1 :]
    return [bucket for bucket in candidates if bucket in chosen]


def _by_shape(candidates: Sequence[str]) -> list[str]:
    """From the highest to the widest; the first of those that have the same shape."""
    first: dict[float, str] = {}
    for bucket in candidates:
        first.setdefault(shape(*bucket_size(bucket)), bucket)
    return [first[key] for key in sorted(first)]


def _nearest(shapes: NDArray[np.float64], line: Sequence[str]) -> NDArray[np.int64]:
    """How many images are nearest to each bucket of a line."""
    at = [shape(*bucket_size(bucket)) for bucket in line]
    borders = [(one + other) / 2 for one, other in pairwise(at)]
    return np.bincount(np.searchsorted(borders, shapes, side="left"), minlength=len(line))


def _fitting(images: NDArray[np.int64], line: list[str], count: int) -> list[str]:
    """The `count` of a line whose distance to the images, which are at their nearest buckets, is least in sum.

    The best choice of k for the first n buckets is that of k - 1 for the first m, and one for those between.
    """
    at = np.array([shape(*bucket_size(bucket)) for bucket in line])
    places = range(len(line) + 1)
    one = {(m, n): _best_one(images[m:n], at[m:n]) for m in places for n in places if m < n}
    best: dict[int, tuple[float, tuple[int, ...]]] = {n: (one[0, n][0], (one[0, n][1],)) for n in places[1:]}
    for _ in range(min(count, int((images > 0).sum())) - 1):
        best = {
            n: min(
                (best[m][0] + one[m, n][0], (*best[m][1], m + one[m, n][1]))
                for m in places
                if m in best and m < n
            )
            for n in places
            if any(m < n for m in best)
        }
    return [line[place] for place in best[len(line)][1]]


def _best_one(images: NDArray[np.int64], at: NDArray[np.float64]) -> tuple[float, int]:
    """(sum of distances, place) of the bucket that is nearest to all of these."""
    sums = np.abs(at[:, None] - at[None, :]) @ images
    place = int(sums.argmin())
    return float(sums[place]), place
