"""What attention compares, from a stream's fused qkv: bias, RMSNorm per head, rotary embedding of pairs of neighbours.

A line is one head of one row, a row one token of one sample. A stream's `mixed` is [lines, 3, D], contiguous: query,
key and value of a head side by side. They come out apart, each at its place in the joint sequence of all streams.
"""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import row_offset

STAGES = tl.constexpr(3)  # blocks of the backward pass that are read or worked on at a time


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
    lane = tl.arange(0, ROWS * HEADS)
    column = tl.arange(0, WIDTH)
    head = tl.program_id(1) * HEADS + lane % HEADS
    query_total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    key_total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    value_total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    query_weight_total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    key_weight_total = tl.zeros([ROWS * HEADS, WIDTH], tl.float32)
    blocks = (rows + ROWS - 1) // ROWS
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + lane // HEADS
        line = row * heads + head
        mask = ((row < rows) & (head < heads))[:, None] & (column < D)[None, :]
        token = row // samples
        read = strided(token, row % samples, head, token_stride, sample_stride, head_stride)
        read = read[:, None] + column[None, :]
        of_query = tl.load(grad_query + read, mask=mask, other=0.0).to(tl.float32)
        of_key = tl.load(grad_key + read, mask=mask, other=0.0).to(tl.float32)
        of_value = tl.load(grad_value + read, mask=mask, other=0.0).to(tl.float32)
        angle = row_offset(token, D)[:, None] + column[None, :]
        of_query = rotate_back(of_query, cosine, sine, angle, mask, ROWS * HEADS, WIDTH)
        of_key = rotate_back(of_key, cosine, sine, angle, mask, ROWS * HEADS, WIDTH)
        if query_weight is not None:
            values = biased(mixed, bias, line, head, column, mask, 0, D)
            of_query, of_weight = through_norm(of_query, values, query_weight, column, epsilon, D)
            query_weight_total += of_weight
            values = biased(mixed, bias, line, head, column, mask, 1, D)
            of_key, of_weight = through_norm(of_key, values, key_weight, column, epsilon, D)
            key_weight_total += of_weight
        if bias_sums is not None:
            query_total += of_query
            key_total += of_key
            value_total += of_value
        place = grad_mixed + row_offset(line, 3 * D)[:, None] + column[None, :]
        tl.store(place, of_query.to(grad_mixed.dtype.element_ty), mask=mask)
        tl.store(place + D, of_key.to(grad_mixed.dtype.element_ty), mask=mask)
        tl.store(place + 2 * D, of_value.to(grad_mixed.dtype.element_ty), mask=mask)
    if bias_sums is not None:
        store_bias_sums(bias_sums, query_total, heads, 0, D, WIDTH, ROWS, HEADS)
        store_bias_sums(bias_sums, key_total, heads, 1, D, WIDTH, ROWS, HEADS)
        store_bias_sums(bias_sums, value_total, heads, 2, D, WIDTH, ROWS, HEADS)
    if query_weight is not None:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        place = weight_sums + program * 2 * D + column
        tl.store(place, tl.sum(query_weight_total, 0), mask=column < D)
        tl.store(place + D, tl.sum(key_weight_total, 0), mask=column < D)


@triton.jit
def through_norm(gradient, values, weight, column, epsilon, D: tl.constexpr):
    """The gradient of what is normed from that of what came out, and each line's share in the weight's."""
    inverse = inverse_rms(values, epsilon, D)[:, None]
    normed = values * inverse
    of_weight = gradient * normed
    gradient *= vector(weight, column, D)
    return inverse * (gradient - normed * (tl.sum(gradient * normed, 1) / D)[:, None]), of_weight


@triton.jit
def store_bias_sums(
    bias_sums, total, heads,
    PART: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """This program's sums for the bias of queries (PART 0), keys (1) or values (2)."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    line = tl.program_id(0) * heads + head
    place = row_offset(line, 3 * D)[:, None] + (PART * D + column)[None, :]
    mask = (head < heads)[:, None] & (column < D)[None, :]
    tl.store(bias_sums + place, tl.sum(tl.reshape(total, [ROWS, HEADS, WIDTH]), 0), mask=mask)


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
