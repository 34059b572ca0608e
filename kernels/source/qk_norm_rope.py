"""RMSNorm of queries and keys per head, and the rotary embedding of pairs of neighbours.

A line is one head of one token. Queries and keys may lie apart in a larger tensor (the fused qkv): tokens, samples and
heads have strides, a head's D elements are neighbours. What comes out is contiguous [S, B, heads, D].
"""

import triton
import triton.language as tl

from soar_mega.kernels.source.sources import row_offset


@triton.jit
def forward_kernel(
    query, key, query_weight, key_weight, cosine, sine, query_out, key_out,
    lines, samples, heads,
    query_token, query_sample, query_head, key_token, key_sample, key_head, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """WIDTH: the power of two >= D; cosine, sine [S, D] or None. Grid: (blocks of LINES lines,)."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, WIDTH)
    mask = (line < lines)[:, None] & (column < D)[None, :]
    place = row_offset(line, D)[:, None] + column[None, :]
    token, sample, head = split(line, samples, heads)
    angle = row_offset(token, D)[:, None] + column[None, :]
    read = strided(token, sample, head, query_token, query_sample, query_head)[:, None] + column[None, :]
    normed, _ = normalise(query + read, mask, epsilon, D)
    out = rotate(normed * vector(query_weight, column, D), cosine, sine, angle, mask, LINES, WIDTH)
    tl.store(query_out + place, out.to(query_out.dtype.element_ty), mask=mask)
    read = strided(token, sample, head, key_token, key_sample, key_head)[:, None] + column[None, :]
    normed, _ = normalise(key + read, mask, epsilon, D)
    out = rotate(normed * vector(key_weight, column, D), cosine, sine, angle, mask, LINES, WIDTH)
    tl.store(key_out + place, out.to(key_out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_query_out, grad_key_out, query, key, query_weight, key_weight, cosine, sine, grad_query, grad_key, partials,
    lines, samples, heads,
    query_token, query_sample, query_head, key_token, key_sample, key_head, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Gradients of query and key, and each program's sums for the two weights, partials [programs, 2, D].

    Each program takes every (number of programs)-th block of LINES lines.
    """
    column = tl.arange(0, WIDTH)
    sums = partials + tl.program_id(0) * 2 * D + column
    total = backward_of_one(
        grad_query_out, query, query_weight, cosine, sine, grad_query, lines, samples, heads,
        query_token, query_sample, query_head, epsilon, D, WIDTH, LINES,
    )  # fmt: skip
    tl.store(sums, total, mask=column < D)
    total = backward_of_one(
        grad_key_out, key, key_weight, cosine, sine, grad_key, lines, samples, heads,
        key_token, key_sample, key_head, epsilon, D, WIDTH, LINES,
    )  # fmt: skip
    tl.store(sums + D, total, mask=column < D)


@triton.jit
def backward_of_one(
    grad_out, source, weight, cosine, sine, grad_source, lines, samples, heads,
    token_stride, sample_stride, head_stride, epsilon,
    D: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """This program's share of the gradient of queries, or of keys; its sum for the weight [WIDTH]."""
    column = tl.arange(0, WIDTH)
    factor = vector(weight, column, D)
    total = tl.zeros([LINES, WIDTH], tl.float32)
    blocks = (lines + LINES - 1) // LINES
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        line = block * LINES + tl.arange(0, LINES)
        mask = (line < lines)[:, None] & (column < D)[None, :]
        place = row_offset(line, D)[:, None] + column[None, :]
        token, sample, head = split(line, samples, heads)
        angle = row_offset(token, D)[:, None] + column[None, :]
        read = (
            strided(token, sample, head, token_stride, sample_stride, head_stride)[:, None] + column[None, :]
        )
        normed, inverse = normalise(source + read, mask, epsilon, D)
        gradient = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        gradient = rotate_back(gradient, cosine, sine, angle, mask, LINES, WIDTH)
        total += gradient * normed
        gradient *= factor
        along = tl.sum(gradient * normed, 1) / D
        gradient = inverse[:, None] * (gradient - normed * along[:, None])
        tl.store(grad_source + place, gradient.to(grad_source.dtype.element_ty), mask=mask)
    return tl.sum(total, 0)


@triton.jit
def split(line, samples, heads):
    """(token, sample, head) of a line."""
    row = line // heads
    return row // samples, row % samples, line % heads


@triton.jit
def strided(token, sample, head, token_stride, sample_stride, head_stride):
    """Elements before a head, int64."""
    return row_offset(token, token_stride) + row_offset(sample, sample_stride) + row_offset(head, head_stride)


@triton.jit
def vector(weight, column, D: tl.constexpr):
    """A norm's weight as one line, float32."""
    return tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise(pointers, mask, epsilon, D: tl.constexpr):
    """(x / rms(x), 1 / rms(x)) of each line."""
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / D + epsilon)
    return values * inverse[:, None], inverse


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
