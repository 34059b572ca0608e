"""How a program reads its group of points, and forms what their rows say of the six sources.

A group is a run of points of one sample, one rollout path and one answer; its line of the table is ten int64 words
(GROUP_WORDS), so that every line begins at a multiple of 16 bytes. A point's line is eight float32 words (POINT_WORDS):
the row's six coefficients, the weight, and the number of its group, which kernels do not need. Every offset of a row is
64 bits wide, the offset of an element inside it 32.
"""

import triton
import triton.language as tl

from soar_mega.kernels.source.philox import normal_at, normal_block

# sample, path, position, first point, end, keys of z1, eps and z1_aux, answer, and one that is not used
GROUP_WORDS = tl.constexpr(10)
POINT_WORDS = tl.constexpr(8)


@triton.jit
def row_offset(row, size):
    """Elements before row `row` of a [rows, size] tensor, int64."""
    return row.to(tl.int64) * size


@triton.jit
def group_of(groups, index):
    """(sample, path, position, first point, end, answer) of a group; an answer is a row of v_uncond and v_cond."""
    line = groups + index * GROUP_WORDS
    sample, path, position = tl.load(line), tl.load(line + 1).to(tl.int32), tl.load(line + 2)
    return sample, path, position, tl.load(line + 3), tl.load(line + 4), tl.load(line + 8)


@triton.jit
def given(pointer, row, size, element, mask):
    """Elements of one row of a source, float32; zero where there is no such source."""
    if pointer is None:
        values = tl.zeros(element.shape, tl.float32)
    else:
        values = tl.load(pointer + row_offset(row, size) + element, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def source(
    pointer, key, row, path, position, size, first, element, mask, DRAW: tl.constexpr, BLOCK: tl.constexpr
):
    """A source that is given, drawn or absent. BLOCK: elements are first ... first + BLOCK - 1; 0: they are any."""
    if DRAW:
        if BLOCK > 0:
            values = normal_block(tl.load(key), first, path, position, BLOCK)
        else:
            values = normal_at(tl.load(key), element, path, position)
    else:
        values = given(pointer, row, size, element, mask)
    return values


@triton.jit
def coefficient(points, point, column: tl.constexpr):
    """One word of a point's line."""
    return tl.load(points + point * POINT_WORDS + column)


@triton.jit
def stochastic_part(
    eps, z1_aux, groups, points, point, row, path, position, size, first, element, mask,
    DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms of eps and z1_aux, which only stochastic paths have. Read or drawn again for every point: six sources
    at once would not fit the registers.
    """
    total = tl.zeros(element.shape, tl.float32)
    if DRAW_EPS or eps is not None:
        noise = source(eps, groups + 6, row, path, position, size, first, element, mask, DRAW_EPS, BLOCK)
        total += coefficient(points, point, 4) * noise
    if DRAW_Z1_AUX or z1_aux is not None:
        noise = source(
            z1_aux, groups + 7, row, path, position, size, first, element, mask, DRAW_Z1_AUX, BLOCK
        )
        total += coefficient(points, point, 5) * noise
    return total


@triton.jit
def shared_part(points, point, s0, s1, s2, s3, z1, v_uncond, v_cond, DRAW_Z1: tl.constexpr):
    """The terms of the four sources that a group's points share."""
    total = coefficient(points, point, 0) * s0
    if DRAW_Z1 or z1 is not None:
        total += coefficient(points, point, 1) * s1
    if v_uncond is not None:
        total += coefficient(points, point, 2) * s2
    if v_cond is not None:
        total += coefficient(points, point, 3) * s3
    return total
