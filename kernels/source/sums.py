"""The second half of deterministic sums: partial sums, one line per program, added up in a fixed order."""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset


@triton.jit
def sum_kernel(
    first, first_sum, first_lines, first_size, second, second_sum, second_lines, second_size,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first_sum [size] = sum of first [lines, size] over its lines; the same of the second, which may be absent.

    Grid: (blocks of the first's size and blocks of the second's,).
    """
    block, blocks = tl.program_id(0), tl.cdiv(first_size, BLOCK)
    if block < blocks:
        add_up(first, first_sum, first_lines, first_size, block, LINES, BLOCK)
    elif second is not None:
        add_up(second, second_sum, second_lines, second_size, block - blocks, LINES, BLOCK)


@triton.jit
def add_up(partials, out, lines, size, block, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """One block of the sum, LINES lines at a time."""
    element = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for first in range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        mask = (line < lines)[:, None] & (element < size)[None, :]
        total += tl.load(partials + row_offset(line, size)[:, None] + element[None, :], mask=mask, other=0.0)
    tl.store(out + element, tl.sum(total, 0).to(out.dtype.element_ty), mask=element < size)
