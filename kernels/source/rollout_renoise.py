"""States from the sources of their sample: out = sum over j of row[j] source[j], each source read once for a group.

eps and z1_aux are read (or drawn) once per point: they belong to stochastic paths only, and six sources at once would
not fit the registers.
"""

import triton
import triton.language as tl

from soar_mega.kernels.source.philox import normal_at, normal_block
from soar_mega.kernels.source.sources import coefficient, given, group_of, row_offset


@triton.jit
def latent_kernel(
    z0, z1, v_uncond, v_cond, eps, z1_aux, groups, points, out, size,
    DRAW_Z1: tl.constexpr, DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [P, size], states in the layout of the latents. Grid: (blocks of size, groups)."""
    first = tl.program_id(0) * BLOCK
    group = tl.program_id(1)
    element = first + tl.arange(0, BLOCK)
    mask = element < size
    sample, path, position, point, end = group_of(groups, group)
    s0 = given(z0, sample, size, element, mask)
    if DRAW_Z1:
        s1 = normal_block(tl.load(groups + 5), first, 0, position, BLOCK)
    else:
        s1 = given(z1, sample, size, element, mask)
    s2 = given(v_uncond, sample, size, element, mask)
    s3 = given(v_cond, sample, size, element, mask)
    while point < end:
        state = coefficient(points, point, 0) * s0
        if DRAW_Z1 or z1 is not None:
            state += coefficient(points, point, 1) * s1
        if v_uncond is not None:
            state += coefficient(points, point, 2) * s2
        if v_cond is not None:
            state += coefficient(points, point, 3) * s3
        if DRAW_EPS:
            state += coefficient(points, point, 4) * normal_block(
                tl.load(groups + 6), first, path, position, BLOCK
            )
        elif eps is not None:
            state += coefficient(points, point, 4) * given(eps, sample, size, element, mask)
        if DRAW_Z1_AUX:
            state += coefficient(points, point, 5) * normal_block(
                tl.load(groups + 7), first, path, position, BLOCK
            )
        elif z1_aux is not None:
            state += coefficient(points, point, 5) * given(z1_aux, sample, size, element, mask)
        tl.store(out + row_offset(point, size) + element, state.to(out.dtype.element_ty), mask=mask)
        point += 1


@triton.jit
def tokens_kernel(
    z0, z1, v_uncond, v_cond, eps, z1_aux, groups, points, out, height, width,
    DRAW_Z1: tl.constexpr, DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_TILE: tl.constexpr, PATCH: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """out [P, tokens, C p p]. Grid: (tiles of width, rows of patches, groups).

    A program reads C rows of p lines as the latents hold them, and turns the tile around in registers.
    """
    size = CHANNELS * height * width
    left = tl.program_id(0) * WIDTH_TILE
    top = tl.program_id(1)
    group = tl.program_id(2)
    channel = tl.arange(0, CHANNELS_TILE)[:, None, None]
    line = tl.arange(0, PATCH)[None, :, None]
    column = left + tl.arange(0, WIDTH_TILE)[None, None, :]
    element = (channel * height + top * PATCH + line) * width + column
    mask = (channel < CHANNELS) & (column < width) & (line < PATCH)

    token_size: tl.constexpr = CHANNELS * PATCH * PATCH
    token_tile: tl.constexpr = CHANNELS_TILE * PATCH * PATCH
    flat = tl.arange(0, CHANNELS_TILE * PATCH * WIDTH_TILE)
    token_column = left // PATCH + flat // token_tile
    target = (top * (width // PATCH) + token_column) * token_size + flat % token_tile
    inside = (flat % token_tile < token_size) & (token_column < width // PATCH)

    sample, path, position, point, end = group_of(groups, group)
    s0 = given(z0, sample, size, element, mask)
    if DRAW_Z1:
        s1 = normal_at(tl.load(groups + 5), element, 0, position)
    else:
        s1 = given(z1, sample, size, element, mask)
    s2 = given(v_uncond, sample, size, element, mask)
    s3 = given(v_cond, sample, size, element, mask)
    while point < end:
        state = coefficient(points, point, 0) * s0
        if DRAW_Z1 or z1 is not None:
            state += coefficient(points, point, 1) * s1
        if v_uncond is not None:
            state += coefficient(points, point, 2) * s2
        if v_cond is not None:
            state += coefficient(points, point, 3) * s3
        if DRAW_EPS:
            state += coefficient(points, point, 4) * normal_at(tl.load(groups + 6), element, path, position)
        elif eps is not None:
            state += coefficient(points, point, 4) * given(eps, sample, size, element, mask)
        if DRAW_Z1_AUX:
            state += coefficient(points, point, 5) * normal_at(tl.load(groups + 7), element, path, position)
        elif z1_aux is not None:
            state += coefficient(points, point, 5) * given(z1_aux, sample, size, element, mask)
        patches = tl.reshape(
            state.to(out.dtype.element_ty), [CHANNELS_TILE, PATCH, WIDTH_TILE // PATCH, PATCH]
        )
        tokens = tl.reshape(tl.permute(patches, (2, 0, 1, 3)), [CHANNELS_TILE * PATCH * WIDTH_TILE])
        tl.store(out + row_offset(point, size) + target, tokens, mask=inside)
        point += 1
