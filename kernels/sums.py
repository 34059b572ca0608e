"""The second half of deterministic sums: what each program has added up, added up in a fixed order."""

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import architecture, launch
from soar_mega.kernels.tables import launch_of

LINES = 64  # partial sums that one program reads at a time


def sum_lines(dtype: torch.dtype, *partials: Tensor | None) -> list[Tensor | None]:
    """Partial sums [lines, ...] float32 -> their sums [...] in `dtype`, by one launch of the Triton source.

    Args:
        partials: one or two, of any lines and sizes; None: not wanted, and nothing in its place.
    """
    from soar_mega.kernels.source.sums import sum_kernel

    given = [each for each in partials if each is not None]
    if not given:
        return [None for _ in partials]
    size = launch_of("sum_lines", "columns", architecture(given[0].device))
    sums = [torch.empty(each.shape[1:], dtype=dtype, device=each.device) for each in given]
    blocks, arguments = 0, []
    for each, out in zip(given, sums, strict=True):
        blocks += -(-out.numel() // size.block)
        arguments += [each, out, len(each), out.numel()]
    arguments += [None, None, 0, 0] * (2 - len(given))
    launch(
        sum_kernel, (blocks,), given[0].device, *arguments,
        LINES=LINES, BLOCK=size.block, num_warps=size.num_warps,
    )  # fmt: skip
    found = iter(sums)
    return [None if each is None else next(found) for each in partials]
