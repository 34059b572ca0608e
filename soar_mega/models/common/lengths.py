"""How long the streams of a sample are."""

from typing import NamedTuple


class Lengths(NamedTuple):
    """Tokens of each stream without padding; layers are recorded as CUDA graphs for each of them.

    grid: the image's tokens in (rows, columns), where what a layer computes depends on more than their number.
    """

    text: int
    image: int
    grid: tuple[int, int] | None = None
