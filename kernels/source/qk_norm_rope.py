"""What attention compares, from a stream's fused qkv: bias, RMSNorm per head, rotary embedding of pairs of neighbours.

A line is one head of one row, a row one token of one sample. A stream's `mixed` is [lines, 3, D], contiguous: query,
key and value of a head side by side. They come out apart, each at its place in the joint sequence of all streams.
"""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset


@triton.jit
def qk_norm_forward_kernel(
    mixed, bias, query_weight, key_weight, cosine, sine, query, key, value,
    lines, samples, heads, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """One stream into its part of query, key and value, each [lines, D]. Grid: (blocks of LINES lines,).

    bias [heads, 3, D], the weights [D] and cosine, sine [tokens, D] may be None. WIDTH: the power of two >= D.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, WIDTH)
    mask = (line < lines)[:, None] & (column < D)[None, :]
    head = line % heads
    place = row_offset(line, D)[:, None] + column[None, :]
    angle = row_offset(line // heads // samples, D)[:, None] + column[None, :]
    values = biased(mixed, bias, line, head, column, mask, 0, D)
    values = rotate(
        normed_by(query_weight, values, column, epsilon, D), cosine, sine, angle, mask, LINES, WIDTH
    )
    tl.store(query + place, values.to(query.dtype.element_ty), mask=mask)
    values = biased(mixed, bias, line, head, column, mask, 1, D)
    values = rotate(
        normed_by(key_weight, values, column, epsilon, D), cosine, sine, angle, mask, LINES, WIDTH
    )
    tl.store(key + place, values.to(key.dtype.element_ty), mask=mask)
    values = biased(mixed, bias, line, head, column, mask, 2, D)
    tl.store(value + place, values.to(value.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_backward_kernel(
    grad_query, grad_key, grad_value, mixed, bias, query_weight, key_weight, cosine, sine,
    grad_mixed, bias_sums, weight_sums,
    rows, samples, heads, token_stride, sample_stride, head_stride, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The gradient of one stream's `mixed`, and each program's sums for the bias and the two weights.

    The gradients of query, key and value [tokens, samples, heads, D] lie alike, with these strides. A program
    takes HEADS heads of every (number of programs)-th block of ROWS rows. bias_sums [programs, heads, 3, D] and
    weight_sums [programs, blocks of heads, 2, D] are None where there is no bias, no weight.
    Grid: (programs, blocks of HEADS heads).
    """
    backward_of_one(
        grad_query, mixed, bias, query_weight, cosine, sine, grad_mixed, bias_sums, weight_sums,
        rows, samples, heads, token_stride, sample_stride, head_stride, epsilon,
        0, D, WIDTH, ROWS, HEADS,
    )  # fmt: skip
    backward_of_one(
        grad_key, mixed, bias, key_weight, cosine, sine, grad_mixed, bias_sums, weight_sums,
        rows, samples, heads, token_stride, sample_stride, head_stride, epsilon,
        1, D, WIDTH, ROWS, HEADS,
    )  # fmt: skip
    backward_of_one(
        grad_value, mixed, bias, None, None, None, grad_mixed, bias_sums, None,
        rows, samples, heads, token_stride, sample_stride, head_stride, epsilon,
        2, D, WIDTH, ROWS, HEADS,
    )  # fmt: skip


@triton.jit
def backward_of_one(
    grad_out, mixed, bias, weight, cosine, sine, grad_mixed, bias_sums, weight_sums,
    rows, samples, heads, token_stride, sample_stride, head_stride, epsilon,
    PART: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """This program's share of the gradient of queries (PART 0), keys (1) or values (2)."""
    lane = tl.arange(0, ROWS * HEADS)
    column = tl.arange(0, WIDTH)
    head = tl.program_id(1) * HEADS + lane % HEADS
    total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    weight_total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        row = block * ROWS + lane // HEADS
        line = row * heads + head
        mask = ((row < rows) & (head < heads))[:, None] & (column < D)[None, :]
        token = row // samples
        angle = row_offset(token, D)[:, None] + column[None, :]
        read = strided(token, row % samples, head, token_stride, sample_stride, head_stride)
        gradient = tl.load(grad_out + (read[:, None] + column[None, :]), mask=mask, other=0.0).to(tl.float32)
        gradient = rotate_back(gradient, cosine, sine, angle, mask, ROWS * HEADS, WIDTH)
        if weight is not None:
            values = biased(mixed, bias, line, head, column, mask, PART, D)
            inverse = inverse_rms(values, epsilon, D)[:, None]
            normed = values * inverse
            weight_total += gradient * normed
            gradient *= vector(weight, column, D)
            gradient = inverse * (gradient - normed * (tl.sum(gradient * normed, 1) / D)[:, None])
        if bias_sums is not None:
            total += gradient
        place = row_offset(line, 3 * D)[:, None] + (PART * D + column)[None, :]
        tl.store(grad_mixed + place, gradient.to(grad_mixed.dtype.element_ty), mask=mask)
    if bias_sums is not None:
        total_of_rows = tl.sum(tl.reshape(total, [ROWS, HEADS, WIDTH]), 0)
        heads_here = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        line = tl.program_id(0) * heads + heads_here
        place = row_offset(line, 3 * D)[:, None] + (PART * D + column)[None, :]
        mask = (heads_here < heads)[:, None] & (column < D)[None, :]
        tl.store(bias_sums + place, total_of_rows, mask=mask)
    if weight is not None:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(weight_sums + (program * 2 + PART) * D + column, tl.sum(weight_total, 0), mask=column < D)


@triton.jit
def biased(mixed, bias, line, head, column, mask, PART: tl.constexpr, D: tl.constexpr):
    """Queries (PART 0), keys (1) or values (2) of some lines, with their bias, float32."""
    place = row_offset(line, 3 * D)[:, None] + (PART * D + column)[None, :]
    values = tl.load(mixed + place, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        place = (head * (3 * D) + PART * D)[:, None] + column[None, :]
        values += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def normed_by(weight, values, column, epsilon, D: tl.constexpr):
    """RMSNorm of each line; without a weight the values as they are."""
    if weight is not None:
        values = values * inverse_rms(values, epsilon, D)[:, None] * vector(weight, column, D)
    return values


@triton.jit
def inverse_rms(values, epsilon, D: tl.constexpr):
    """1 / rms of each line."""
    return 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / D + epsilon)


@triton.jit
def strided(token, sample, head, token_stride, sample_stride, head_stride):
    """Elements before a head, int64."""
    return row_offset(token, token_stride) + row_offset(sample, sample_stride) + row_offset(head, head_stride)


@triton.jit
def vector(weight, column, D: tl.constexpr):
    """A norm's weight as one line, float32."""
    return tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rotate(values, cosine, sine, angle, mask, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """x cos + (-x1, x0) sin, pair by pair."""
    if cosine is not None:
        first, second = tl.split(tl.reshape(values, [LINES, WIDTH // 2, 2]))
        turned = tl.reshape(tl.join(-second, first), [LINES, WIDTH])
        values = values * tl.load(cosine + angle, mask=mask, other=0.0) + turned * tl.load(
            sine + angle, mask=mask, other=0.0
        )
    return values


@triton.jit
def rotate_back(gradient, cosine, sine, angle, mask, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """The transpose of `rotate`."""
    if cosine is not None:
        crossed = gradient * tl.load(sine + angle, mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(crossed, [LINES, WIDTH // 2, 2]))
        turned = tl.reshape(tl.join(second, -first), [LINES, WIDTH])
        gradient = gradient * tl.load(cosine + angle, mask=mask, other=0.0) + turned
    return gradient
