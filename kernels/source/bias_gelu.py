"""Bias and GELU by its tanh form. x tanh's form is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset

TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def bias_gelu_forward_kernel(x, bias, out, rows, each, F, BLOCK: tl.constexpr):
    """out [rows, F] = GELU(x + bias). bias [F] may be None. Grid: (blocks of `each` rows, blocks of BLOCK columns)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    first = tl.program_id(0) * each
    offset = shifts(bias, column, mask, BLOCK)
    for row_number in range(tl.minimum(each, rows - first)):
        place = row_offset(first + row_number, F) + column
        values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + offset
        gate = 1.0 / (1.0 + tl.exp(-values * TWICE * (1.0 + values * values * CUBIC)))
        tl.store(out + place, (values * gate).to(out.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_backward_kernel(grad_out, x, bias, grad_x, sums, rows, each, F, BLOCK: tl.constexpr):
    """The gradient of x, and each program's sum of it over its rows: sums [programs, F], None where none is asked for.

    Grid: (programs of `each` rows, blocks of BLOCK columns).
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    offset = shifts(bias, column, mask, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * each
    for row_number in range(tl.minimum(each, rows - first)):
        place = row_offset(first + row_number, F) + column
        values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + offset
        gradient = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        square = values * values * CUBIC
        gate = 1.0 / (1.0 + tl.exp(-values * TWICE * (1.0 + square)))
        gradient *= gate + values * gate * (1.0 - gate) * TWICE * (1.0 + square * 3.0)
        tl.store(grad_x + place, gradient.to(grad_x.dtype.element_ty), mask=mask)
        total += gradient
    if sums is not None:
        tl.store(sums + row_offset(tl.program_id(0), F) + column, total, mask=mask)


@triton.jit
def shifts(bias, column, mask, BLOCK: tl.constexpr):
    """The bias of some columns, float32; zero without one."""
    values = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        values += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return values
