"""How a program reads its group of points, and the six sources of that group.

A group is a run of points of one sample and one rollout path; its line of the table is eight int64 words (GROUP_WORDS),
a point's line eight float32 words (POINT_WORDS): the row's six coefficients, the weight, and one that is not used.
Every offset of a row is 64 bits wide, the offset of an element inside it 32.
"""

import triton
import triton.language as tl

GROUP_WORDS = tl.constexpr(8)  # sample, path, position, first point, end, keys of z1, eps and z1_aux
POINT_WORDS = tl.constexpr(8)


@triton.jit
def row_offset(row, size):
    """Elements before row `row` of a [rows, size] tensor, int64."""
    return row.to(tl.int64) * size


@triton.jit
def group_of(groups, index):
    """(sample, path, position, first point, end) of a group."""
    line = groups + index * GROUP_WORDS
    return (
        tl.load(line),
        tl.load(line + 1).to(tl.int32),
        tl.load(line + 2),
        tl.load(line + 3),
        tl.load(line + 4),
    )


@triton.jit
def given(pointer, row, size, element, mask):
    """Elements of one row of a source, float32; zero where there is no such source."""
    if pointer is None:
        values = tl.zeros(element.shape, tl.float32)
    else:
        values = tl.load(pointer + row_offset(row, size) + element, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def coefficient(points, point, column: tl.constexpr):
    """One word of a point's line."""
    return tl.load(points + point * POINT_WORDS + column)
