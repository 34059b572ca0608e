"""States from the sources of their sample: state = sum over j of row[j] source[j], sources read once for a group."""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import (
    given,
    group_of,
    row_offset,
    shared_part,
    source,
    stochastic_part,
)


@triton.jit
def rollout_renoise_latent_kernel(
    z0, z1, v_uncond, v_cond, eps, z1_aux, groups, points, out, size,
    DRAW_Z1: tl.constexpr, DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [P, size], states in the layout of the latents. Grid: (blocks of size, groups)."""
    first = tl.program_id(0) * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < size
    sample, path, position, point, end, answer = group_of(groups, tl.program_id(1))
    s0 = given(z0, sample, size, element, mask)
    s1 = source(z1, groups + 5, sample, 0, position, size, first, element, mask, DRAW_Z1, BLOCK)
    s2 = given(v_uncond, answer, size, element, mask)
    s3 = given(v_cond, answer, size, element, mask)
    while point < end:
        state = stochastic_part(
            eps, z1_aux, groups, points, point, sample, path, position, size, first, element, mask,
            DRAW_EPS, DRAW_Z1_AUX, BLOCK,
        )  # fmt: skip
        if DRAW_EPS or DRAW_Z1_AUX:
            # making noise takes their registers: they come back from the cache
            s0 = given(z0, sample, size, element, mask)
            s2 = given(v_uncond, answer, size, element, mask)
            s3 = given(v_cond, answer, size, element, mask)
        state += shared_part(points, point, s0, s1, s2, s3, z1, v_uncond, v_cond, DRAW_Z1)
        tl.store(out + row_offset(point, size) + element, state.to(out.dtype.element_ty), mask=mask)
        point += 1


@triton.jit
def rollout_renoise_tokens_kernel(
    z0, z1, v_uncond, v_cond, eps, z1_aux, groups, points, out, height, width,
    DRAW_Z1: tl.constexpr, DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_TILE: tl.constexpr, PATCH: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """out [P, tokens, C p p]. Grid: (tiles of width, rows of patches, groups).

    A program reads C rows of p lines as the latents hold them, and turns the tile around before it writes.
    """
    size = CHANNELS * height * width
    left = tl.program_id(0) * WIDTH_TILE
    top = tl.program_id(1)
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

    sample, path, position, point, end, answer = group_of(groups, tl.program_id(2))
    s0 = given(z0, sample, size, element, mask)
    s1 = source(z1, groups + 5, sample, 0, position, size, 0, element, mask, DRAW_Z1, 0)
    s2 = given(v_uncond, answer, size, element, mask)
    s3 = given(v_cond, answer, size, element, mask)
    while point < end:
        state = stochastic_part(
            eps, z1_aux, groups, points, point, sample, path, position, size, 0, element, mask,
            DRAW_EPS, DRAW_Z1_AUX, 0,
        )  # fmt: skip
        state += shared_part(points, point, s0, s1, s2, s3, z1, v_uncond, v_cond, DRAW_Z1)
        state = state.to(out.dtype.element_ty)
        patches = tl.reshape(state, [CHANNELS_TILE, PATCH, WIDTH_TILE // PATCH, PATCH])
        tokens = tl.reshape(tl.permute(patches, (2, 0, 1, 3)), [CHANNELS_TILE * PATCH * WIDTH_TILE])
        tl.store(out + row_offset(point, size) + target, tokens, mask=inside)
        point += 1
