"""A gated branch joins the residual stream, tokens [S, B, H]: a program takes some tokens and columns of a sample."""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset


@triton.jit
def gated_add_forward_kernel(
    residual, branch, bias, gate, out, tokens, samples, each, H, gate_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """out = residual + gate (branch + bias). gate [B, H], bias [H] or None.

    Grid: (blocks of `each` tokens, B, blocks of columns).
    """
    sample = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = column < H
    strength = tl.load(gate + row_offset(sample, gate_stride) + column, mask=mask, other=0.0).to(tl.float32)
    offset = vector(bias, column, mask, BLOCK)
    first = tl.program_id(0) * each
    for number in range(tl.minimum(each, tokens - first)):
        place = row_offset(row_offset(first + number, samples) + sample, H) + column
        values = tl.load(branch + place, mask=mask, other=0.0).to(tl.float32) + offset
        values = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32) + strength * values
        tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_add_backward_kernel(
    grad_out, branch, bias, gate, grad_branch, gate_sums, bias_sums, tokens, samples, each, H, gate_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of branch, and each program's sums for gate and bias: each [programs, B, H], or None for the bias.

    Grid: (programs of `each` tokens, B, blocks of columns). The gradient of the residual is grad_out.
    """
    sample = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = column < H
    strength = tl.load(gate + row_offset(sample, gate_stride) + column, mask=mask, other=0.0).to(tl.float32)
    offset = vector(bias, column, mask, BLOCK)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * each
    for number in range(tl.minimum(each, tokens - first)):
        place = row_offset(row_offset(first + number, samples) + sample, H) + column
        gradient = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        sum_gate += gradient * (tl.load(branch + place, mask=mask, other=0.0).to(tl.float32) + offset)
        gradient *= strength
        sum_bias += gradient
        tl.store(grad_branch + place, gradient.to(grad_branch.dtype.element_ty), mask=mask)
    place = row_offset(row_offset(tl.program_id(0), samples) + sample, H) + column
    tl.store(gate_sums + place, sum_gate, mask=mask)
    if bias_sums is not None:
        tl.store(bias_sums + place, sum_bias, mask=mask)


@triton.jit
def vector(bias, column, mask, BLOCK: tl.constexpr):
    """The bias of some columns, float32; zero without one."""
    values = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        values += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return values
