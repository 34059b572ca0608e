"""Aspect buckets: the sizes that images are brought to."""

import math
from collections.abc import Sequence

from soar_mega.data.info import bucket_name, bucket_size

WIDEST = 2.0  # width by height, and the inverse
STEPS = 16  # sizes are multiples of about resolution / STEPS


def generate_buckets(resolution: int, multiple: int, largest_side: int) -> list[str]:
    """Sizes of about resolution^2 pixels, from 1:2 to 2:1, as "WIDTHxHEIGHT".

    Args:
        resolution: edge of the square bucket, in pixels.
        multiple: what the transformer and the VAE need widths and heights to divide by.
        largest_side: widest and highest that the transformer has positions for.
    """
    step = multiple * max(1, round(resolution / multiple / STEPS))
    sizes = {(resolution, resolution)}
    for width in range(step, largest_side + 1, step):
        height = step * round(resolution**2 / width / step)
        if 0 < height <= largest_side and 1 / WIDEST <= width / height <= WIDEST:
            sizes |= {(width, height), (height, width)}
    return check_buckets([bucket_name(*size) for size in sorted(sizes)], multiple, largest_side)


def check_buckets(buckets: Sequence[str], multiple: int, largest_side: int) -> list[str]:
    """The buckets, or a ValueError naming the one that the model cannot take."""
    for bucket in buckets:
        problem = bucket_problem(bucket, multiple, largest_side)
        if problem:
            raise ValueError(problem)
    return list(buckets)


def bucket_problem(bucket: str, multiple: int, largest_side: int) -> str | None:
    """Why the model cannot take this size; None when it can."""
    width, height = bucket_size(bucket)
    if width % multiple or height % multiple:
        near = bucket_name(*(max(1, round(side / multiple)) * multiple for side in (width, height)))
        return f"bucket {bucket}: width and height must be multiples of {multiple} pixels, for example {near}"
    if max(width, height) > largest_side:
        return f"bucket {bucket}: the transformer has positions for {largest_side} pixels a side at most"
    return None


def nearest_bucket(width: int, height: int, buckets: Sequence[str]) -> str:
    """The bucket whose aspect ratio is nearest to that of an image; the first of equals."""

    of_image = shape(width, height)
    return min(buckets, key=lambda bucket: abs(of_image - shape(*bucket_size(bucket))))


def shape(width: int, height: int) -> float:
    """What the distances between aspect ratios are taken of."""
    return math.log(width / height)
