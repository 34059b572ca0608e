"""Gate, residual, LayerNorm and modulation of tokens [S, B, H]: a program works on tokens of one sample, row by row.

A row lies in registers while its mean and variance are formed, so every tensor is read once and written once. The
sample's vectors are read once per program. Backward, a few programs take all rows in turns, and the rows to come are on
their way while one is worked on.
"""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset

STAGES = tl.constexpr(3)  # rows of the backward pass that are read or worked on at a time


@triton.jit
def adaln_forward_kernel(
    residual, branch, bias, gate, shift, scale, hidden, modulated, statistics,
    tokens, samples, gate_stride, shift_stride, scale_stride, epsilon,
    H: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """hidden = residual + gate (branch + bias), not without a branch; modulated = norm(hidden) (1 + scale) + shift.

    bias [H] may be None.
    statistics [S, B, 2]: mean and 1 / deviation of each row. WIDTH: the power of two >= H. Grid: (blocks of ROWS
    tokens, samples).
    """
    sample = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    mask = column < H
    offset = vector(shift, sample, shift_stride, column, mask)
    factor = 1.0 + vector(scale, sample, scale_stride, column, mask)
    if branch is not None:
        strength = vector(gate, sample, gate_stride, column, mask)
    first = tl.program_id(0) * ROWS
    for row_number in range(tl.minimum(ROWS, tokens - first)):
        line = row_offset(first + row_number, samples) + sample
        place = line * H + column
        row = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        if branch is not None:
            row += strength * biased(branch, bias, place, column, mask)
            stored = row.to(hidden.dtype.element_ty)
            tl.store(hidden + place, stored, mask=mask)
            row = stored.to(tl.float32)  # what the backward pass will read
        mean = tl.sum(row, 0) / H
        centred = tl.where(mask, row - mean, 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / H + epsilon)
        out = centred * inverse * factor + offset
        tl.store(modulated + place, out.to(modulated.dtype.element_ty), mask=mask)
        tl.store(statistics + line * 2, mean)
        tl.store(statistics + line * 2 + 1, inverse)


@triton.jit
def adaln_backward_kernel(
    grad_hidden, grad_modulated, hidden, branch, bias, gate, scale, statistics,
    grad_residual, grad_branch, partials, bias_sums,
    tokens, samples, gate_stride, scale_stride,
    H: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of residual and branch; sums of this program for shift, scale and gate: partials [programs, 3, B, H].

    grad_hidden is absent where nothing but the norm reads hidden; without a branch partials are [programs, 2, B, H].
    bias_sums [programs, B, H]: the same for the bias, where its gradient is asked for. Grid: (programs, samples); a
    program takes every (number of programs)-th token.
    """
    sample = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    mask = column < H
    factor = 1.0 + vector(scale, sample, scale_stride, column, mask)
    if branch is not None:
        strength = vector(gate, sample, gate_stride, column, mask)
        sum_gate = tl.zeros([WIDTH], tl.float32)
        sum_bias = tl.zeros([WIDTH], tl.float32)
    sum_shift = tl.zeros([WIDTH], tl.float32)
    sum_scale = tl.zeros([WIDTH], tl.float32)
    first = tl.program_id(0)
    for further in tl.range(0, tokens - first, tl.num_programs(0), num_stages=STAGES):
        line = row_offset(first + further, samples) + sample
        place = line * H + column
        mean = tl.load(statistics + line * 2)
        inverse = tl.load(statistics + line * 2 + 1)
        gradient = tl.load(grad_modulated + place, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
        normed = (row - mean) * inverse  # of no account beyond H, where the gradient is zero
        sum_shift += gradient
        sum_scale += gradient * normed
        gradient *= factor
        along = tl.sum(gradient * normed, 0) / H
        gradient = inverse * (gradient - tl.sum(gradient, 0) / H - normed * along)
        if grad_hidden is not None:
            gradient += tl.load(grad_hidden + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_residual + place, gradient.to(grad_residual.dtype.element_ty), mask=mask)
        if branch is not None:
            tl.store(grad_branch + place, (strength * gradient).to(grad_branch.dtype.element_ty), mask=mask)
            sum_gate += gradient * biased(branch, bias, place, column, mask)
            if bias_sums is not None:
                sum_bias += strength * gradient
    kinds = 2 if branch is None else 3
    block = row_offset(tl.program_id(0), kinds * samples) + sample
    tl.store(partials + block * H + column, sum_shift, mask=mask)
    tl.store(partials + (block + samples) * H + column, sum_scale, mask=mask)
    if branch is not None:
        tl.store(partials + (block + 2 * samples) * H + column, sum_gate, mask=mask)
        if bias_sums is not None:
            place = (row_offset(tl.program_id(0), samples) + sample) * H + column
            tl.store(bias_sums + place, sum_bias, mask=mask)


@triton.jit
def biased(branch, bias, place, column, mask):
    """A row of the branch with its bias, float32."""
    row = tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        row += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return row


@triton.jit
def vector(pointer, sample, stride, column, mask):
    """A sample's shift, scale or gate, float32."""
    return tl.load(pointer + row_offset(sample, stride) + column, mask=mask, other=0.0).to(tl.float32)
