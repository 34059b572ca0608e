"""The second half of a deterministic sum: partial sums, one line per program, added up in a fixed order."""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset


@triton.jit
def sum_kernel(partials, out, lines, size, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = sum of partials [lines, size] over its lines, LINES at a time. Grid: (blocks of size,)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for first in range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        mask = (line < lines)[:, None] & (element < size)[None, :]
        total += tl.load(partials + row_offset(line, size)[:, None] + element[None, :], mask=mask, other=0.0)
    tl.store(out + element, tl.sum(total, 0).to(out.dtype.element_ty), mask=element < size)
