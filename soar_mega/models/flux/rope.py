"""Rotary positions over three axes: the index of a text token (always 0 in FLUX.1), row and column of a patch."""

from functools import cache

import torch
from torch import Tensor

THETA = 10000.0

Tables = tuple[Tensor, Tensor]


@cache
def rotation(
    axes: tuple[int, ...], text: int, grid: tuple[int, int], order: tuple[range, ...], device: torch.device
) -> Tables:
    """Cosine and sine of every token's angles: each [text + rows x columns, D] float32.

    Each angle stands twice, for both of a pair of neighbours. Tables are kept: they are the same in every layer and
    every step, and a CUDA graph reads them where they were when it was recorded.

    Args:
        axes: how many of a head's D numbers each axis turns.
        text: tokens, all at the origin.
        grid: rows and columns of the image's patches.
        order: of the tokens, the places that they have in the text followed by the image.
    """
    rows, columns = grid
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    places = [torch.zeros_like(row), row, column]
    waves = [_angles(width, place) for width, place in zip(axes, places, strict=True)]
    angles = torch.nn.functional.pad(torch.cat(waves, dim=1), (0, 0, text, 0))
    angles = torch.cat([angles[part.start : part.stop] for part in order])
    return angles.cos().float(), angles.sin().float()


def _angles(width: int, places: Tensor) -> Tensor:
    """Places [S] -> angles [S, width] float64, as diffusers computes them."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=places.device) / width
    frequencies = 1.0 / THETA**exponents
    return (places.double()[:, None] * frequencies).repeat_interleave(2, dim=1)
