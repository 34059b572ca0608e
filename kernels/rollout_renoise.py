"""The states of SOAR's training points in one pass: guidance, rollout step and noising are one row of coefficients.

    state[p] = sum over j of rows[p, j] source_j[sample[p]]

Six sources go in, each read once for all points of a sample and path; only states in the type of the model come out.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import FLOATS, architecture, define, launch, launches
from soar_mega.kernels.sources import check_points, check_values, combined, tables, width_class
from soar_mega.kernels.tables import launch_of

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
    point = check_points(sources, rows, sample, path, draw, position)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    patch = 0 if patch_size is None else patch_size
    if patch_size is not None and (patch not in PATCHES or z0.shape[2] % patch or z0.shape[3] % patch):
        raise ValueError(
            f"patch_size must be one of {PATCHES} and divide height and width of z0 {list(z0.shape)}, not {patch_size}"
        )
    states = _operation(
        *sources, point.rows, point.sample, point.path, point.position, seed, point.drawn, dtype, patch
    )
    return states.unflatten(0, point.leading)


def _triton(
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    eps: Tensor | None,
    z1_aux: Tensor | None,
    rows: Tensor,
    sample: Tensor,
    path: Tensor,
    position: Tensor | None,
    seed: int,
    drawn: Sequence[bool],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    from soar_mega.kernels.source.rollout_renoise import latent_kernel, tokens_kernel

    given = (z0, z1, v_uncond, v_cond, eps, z1_aux)
    used = check_values(given, rows, sample, drawn)
    sources = [source if read else None for source, read in zip(given, used, strict=True)]
    draws = [made and read for made, read in zip(drawn, used, strict=True)]
    groups, points = tables(rows, sample, path, position, seed, None, z0.device)
    flags = {"DRAW_Z1": draws[1], "DRAW_EPS": draws[4], "DRAW_Z1_AUX": draws[5]}
    arch = architecture(z0.device)
    _, channels, height, width = z0.shape
    out = torch.empty(_shape(z0, len(rows), patch), dtype=dtype, device=z0.device)
    arguments = (*sources, groups, points, out)
    if not patch:
        size = launch_of("rollout_renoise", width_class(*sources, out), arch)
        elements = channels * height * width
        grid: tuple[int, ...] = (-(-elements // size.block), len(groups))
        launch(
            latent_kernel,
            grid,
            z0.device,
            *arguments,
            elements,
            **flags,
            BLOCK=size.block,
            num_warps=size.num_warps,
        )
        return out
    size = launch_of("rollout_renoise", "tokens", arch)
    channels_tile = _power_of_two(channels)
    tile = min(max(patch, size.block // (channels_tile * patch)), _power_of_two(width))
    grid = (-(-width // tile), height // patch, len(groups))
    tiles = {"CHANNELS": channels, "CHANNELS_TILE": channels_tile, "PATCH": patch, "WIDTH_TILE": tile}
    launch(
        tokens_kernel, grid, z0.device, *arguments, height, width, **flags, **tiles, num_warps=size.num_warps
    )
    return out


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _eager(
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    eps: Tensor | None,
    z1_aux: Tensor | None,
    rows: Tensor,
    sample: Tensor,
    path: Tensor,
    position: Tensor | None,
    seed: int,
    drawn: Sequence[bool],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    sources = (z0, z1, v_uncond, v_cond, eps, z1_aux)
    states = combined(sources, rows, sample, path, position, seed, drawn).to(dtype)
    return to_tokens(states, patch) if patch else states


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


def _forward(z0: Tensor, *arguments: Any) -> Tensor:
    return (_triton if launches(z0.device) else _eager)(z0, *arguments)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    sources, (rows, sample) = inputs[:6], inputs[6:8]
    ctx.save_for_backward(rows, sample)
    ctx.shape = sources[0].shape  # type: ignore[attr-defined]
    ctx.dtypes = [None if source is None else source.dtype for source in sources]  # type: ignore[attr-defined]
    ctx.patch = inputs[13]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """A state is linear in its sources: each one's gradient is the sum of its points', with their coefficients."""
    rows, sample = ctx.saved_tensors  # type: ignore[attr-defined]
    shape, dtypes, patch = ctx.shape, ctx.dtypes, ctx.patch  # type: ignore[attr-defined]
    if patch:
        gradient = to_latents(gradient, patch, shape)
    reads = (torch.arange(shape[0])[:, None] == sample).double()  # [B, P]
    found: list[Tensor | None] = []
    for column, (dtype, needed) in enumerate(zip(dtypes, ctx.needs_input_grad[:6], strict=True)):  # type: ignore[attr-defined]
        if not needed:
            found.append(None)
            continue
        factors = (reads * rows[:, column]).to(gradient.device, torch.float32)
        # a matrix product sums in a fixed order, unlike index_add
        found.append((factors @ gradient.float().flatten(1)).reshape(shape).to(dtype))
    return *found, *[None] * 8


_operation = define(
    "rollout_renoise",
    forward=_forward,
    setup_context=_setup_context,
    backward=_backward,
)
