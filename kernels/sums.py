"""The second half of a deterministic sum: what each program has added up, added up in a fixed order."""

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import architecture, launch
from soar_mega.kernels.tables import launch_of

LINES = 64  # partial sums that one program reads at a time


def sum_lines(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """partials [lines, ...] float32 -> their sum [...] in `dtype`, by one launch of the Triton source."""
    from soar_mega.kernels.source.sums import sum_kernel

    size = launch_of("sum_lines", "columns", architecture(partials.device))
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    grid = (-(-out.numel() // size.block),)
    launch(
        sum_kernel, grid, partials.device, partials, out, len(partials), out.numel(),
        LINES=LINES, BLOCK=size.block, num_warps=size.num_warps,
    )  # fmt: skip
    return out
