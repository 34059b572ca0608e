"""The states of SOAR's training points in one pass: guidance, rollout step and noising are one row of coefficients.

    state[p] = sum over j of rows[p, j] source_j[sample[p]]

Six sources go in, each read once for all points of a sample and path; only states in the type of the model come out.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import FLOATS, architecture, define, launch, launches, power_of_two
from soar_mega.kernels.point_tables import (
    ANSWER,
    SAMPLE,
    PointTable,
    check_sources,
    combined,
    one_table,
)
from soar_mega.kernels.tables import launch_of, width_class

PATCHES = (1, 2, 4, 8)


def rollout_renoise(
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    rows: Tensor,
    *,
    eps: Tensor | None = None,
    z1_aux: Tensor | None = None,
    sample: Tensor | None = None,
    path: Tensor | None = None,
    draw: Collection[str] = (),
    seed: int = 0,
    position: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    patch_size: int | None = None,
) -> Tensor:
    """States of P points, [P, C, H, W] or, for rows [B, N, 6], [B, N, C, H, W]. Differentiable in the sources.

    Args:
        z0, z1, v_uncond, v_cond, eps, z1_aux: [B, C, H, W] float32, bfloat16 or float16 on one device; those that no
            row reads, and those that are drawn, may be None (z0 may not: it says where the states live).
        rows: float64 coefficients over the six sources in this order (`soar_mega.flow.rows`), on the CPU: [B, N, 6],
            or [P, 6] with `sample` [P] int64, the sample each point reads, and `path` [P] int64, its rollout path
            (0 if None). Neighbours of one sample and path share one reading of the sources.
        draw: which of z1, eps and z1_aux are made in the kernel: the numbers of `soar_mega.flow.normal` for
            (seed, "noise", position, 0), (seed, "rollout", position, path) and (seed, "endpoint", position, path).
        seed, position: [B] int64 on the CPU; read by `draw` alone.
        dtype: of the states.
        patch_size: p, for states as the patches that a p x p patch embedding reads: [..., H W / p^2, C p p], patches
            row by row, each flattened as the embedding's weight [out, C, p, p] is.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, not contiguous or empty, or a source that the rows
            read and nobody gives; the message names it.
    """
    sources = (z0, z1, v_uncond, v_cond, eps, z1_aux)
    table, leading = one_table(
        sources, rows, weight=None, sample=sample, path=path, draw=draw, seed=seed, position=position
    )
    return states_of(sources, table, dtype, patch_size).unflatten(0, leading)


def states_of(
    sources: Sequence[Tensor | None],
    table: PointTable,
    dtype: torch.dtype = torch.float32,
    patch_size: int | None = None,
) -> Tensor:
    """`rollout_renoise` of a table that is on the device already: [P, C, H, W], or patches. The host waits for nothing.

    Args:
        sources: in the order of `soar_mega.flow.SOURCES`; v_uncond and v_cond [A, C, H, W] have the table's answers as
            rows.
    """
    z0 = sources[0]
    assert z0 is not None
    check_sources(z0, *sources[1:])
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    patch = 0 if patch_size is None else patch_size
    if patch_size is not None and (patch not in PATCHES or z0.shape[2] % patch or z0.shape[3] % patch):
        raise ValueError(
            f"patch_size must be one of {PATCHES} and divide height and width of z0 {list(z0.shape)}, not {patch_size}"
        )
    states: Tensor = _operation(*sources, table, dtype, patch)
    return states


def _forward(*arguments: Any) -> Tensor:
    sources, (table, dtype, patch) = arguments[:6], arguments[6:]
    read = table.read(sources)
    if launches(sources[0].device):
        return _launched(sources[0], read, table, dtype, patch)
    states = combined(sources, table).to(dtype)
    return to_tokens(states, patch) if patch else states


def _launched(
    z0: Tensor, sources: list[Tensor | None], table: PointTable, dtype: torch.dtype, patch: int
) -> Tensor:
    from soar_mega.kernels.source.rollout_renoise import (
        rollout_renoise_latent_kernel,
        rollout_renoise_tokens_kernel,
    )

    _, channels, height, width = z0.shape
    out = torch.empty(_shape(z0, len(table), patch), dtype=dtype, device=z0.device)
    arguments = (*sources, table.groups, table.points, out)
    arch = architecture(z0.device)
    if not patch:
        size = launch_of("rollout_renoise", width_class(*sources, out), arch)
        elements = channels * height * width
        grid: tuple[int, ...] = (-(-elements // size.block), len(table.groups))
        constants = {"BLOCK": size.block, "num_warps": size.num_warps}
        launch(
            rollout_renoise_latent_kernel, grid, z0.device, *arguments, elements, **table.draws(), **constants
        )
        return out
    size = launch_of("rollout_renoise", "tokens", arch)
    channels_tile = power_of_two(channels)
    tile = min(max(patch, size.block // (channels_tile * patch)), power_of_two(width))
    grid = (-(-width // tile), height // patch, len(table.groups))
    constants = {"CHANNELS": channels, "CHANNELS_TILE": channels_tile, "PATCH": patch, "WIDTH_TILE": tile}
    constants["num_warps"] = size.num_warps
    launch(
        rollout_renoise_tokens_kernel,
        grid,
        z0.device,
        *arguments,
        height,
        width,
        **table.draws(),
        **constants,
    )
    return out


def to_tokens(states: Tensor, patch: int) -> Tensor:
    """[P, C, H, W] -> the patches of a patch embedding, [P, H W / patch^2, C patch patch]."""
    count, channels, height, width = states.shape
    grid = states.reshape(count, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(_shape(states, count, patch))


def to_latents(tokens: Tensor, patch: int, shape: torch.Size) -> Tensor:
    """The inverse of `to_tokens`; shape: [..., C, H, W] of the latents."""
    channels, height, width = shape[-3:]
    grid = tokens.reshape(-1, height // patch, width // patch, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


def _shape(z0: Tensor, points: int, patch: int) -> tuple[int, ...]:
    _, channels, height, width = z0.shape
    if patch:
        return points, height * width // patch**2, channels * patch**2
    return points, channels, height, width


def _setup_context(ctx: Any, arguments: tuple[Any, ...], states: Tensor) -> None:
    sources, (table, _, patch) = arguments[:6], arguments[6:]
    ctx.table, ctx.patch = table, patch
    ctx.layouts = [None if source is None else (source.shape, source.dtype) for source in sources]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """A state is linear in its sources: each one's gradient is the sum of its points', with their coefficients."""
    table = ctx.table
    if ctx.patch:
        gradient = to_latents(gradient, ctx.patch, ctx.layouts[0][0])
    gradient = gradient.float().flatten(1)
    sample, answer = table.column(SAMPLE), table.column(ANSWER)
    found: list[Tensor | None] = []
    for column, (layout, needed) in enumerate(zip(ctx.layouts, ctx.needs_input_grad[:6], strict=True)):
        if not needed:
            found.append(None)
            continue
        shape, dtype = layout
        row = answer if column in (2, 3) else sample
        reads = torch.arange(shape[0], device=row.device)[:, None] == row  # [rows, P]
        # a matrix product sums in a fixed order, unlike index_add
        found.append(((reads * table.points[:, column]) @ gradient).reshape(shape).to(dtype))
    return *found, None, None, None


_operation = define(
    "rollout_renoise",
    forward=_forward,
    setup_context=_setup_context,
    backward=_backward,
)
