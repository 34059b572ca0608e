"""Text and image as one stream, cut over the ranks as each of them is.

A rank's tokens of the joined stream are its tokens of the text, then its tokens of the image. Gathered over the ranks
the two alternate, with the padding of each at its end. Attention does not mind the order, only padding must be cut out
before and put back behind it.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from soar_mega.kernels.qk_norm_rope import Projected


@dataclass(frozen=True)
class Joined:
    """The joined stream as the ranks together have it.

    Attributes:
        runs: tokens that follow each other, and the padding behind them.
        order: of the tokens, the places that they have in the text followed by the image.
    """

    runs: tuple[tuple[int, int], ...]
    order: tuple[range, ...]

    def cut(self, projected: Projected) -> list[Projected]:
        """Of all ranks' tokens, padding included, the parts that attention takes one after the other."""
        if len(self.runs) == 1:
            return [projected._replace(length=self.runs[0][0])]
        parts = projected.mixed.split([tokens + padding for tokens, padding in self.runs])
        return [
            projected._replace(mixed=part, length=tokens)
            for part, (tokens, _) in zip(parts, self.runs, strict=True)
        ]

    def put_back(self, context: Tensor) -> Tensor:
        """What attention returns [tokens, B, F], with the padding at its places."""
        if not any(padding for _, padding in self.runs):
            return context
        parts = context.split([tokens for tokens, _ in self.runs])
        return torch.cat(
            [
                F.pad(part, (0, 0, 0, 0, 0, padding))
                for part, (_, padding) in zip(parts, self.runs, strict=True)
            ]
        )


@cache
def join(text: int, image: int, text_part: int, image_part: int, shards: int) -> Joined:
    """How two streams lie together.

    Args:
        text, image: their tokens without padding.
        text_part, image_part: tokens and padding that each of the `shards` ranks has.
    """
    pieces: list[tuple[range, int]] = []  # of each rank and stream: the tokens' places, and padding
    for rank in range(shards):
        for length, part, before in ((text, text_part, 0), (image, image_part, text)):
            start, stop = (min(part * n, length) for n in (rank, rank + 1))
            pieces.append((range(before + start, before + stop), part - (stop - start)))
    order = tuple(places for places, _ in pieces if places)
    runs: list[tuple[int, int]] = [(0, 0)]
    for places, padding in pieces:
        tokens, behind = runs[-1]
        if places and behind:
            runs.append((len(places), padding))
        else:
            runs[-1] = (tokens + len(places), behind + padding)
    return Joined(tuple(runs), order)
