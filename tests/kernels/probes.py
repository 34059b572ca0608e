"""Kernels of a few lines around functions of the sources. Imported where Triton interprets, or on CUDA."""

import triton
import triton.language as tl

from soar_mega.kernels.source import philox, qk_norm_rope
from soar_mega.kernels.source.point_tables import row_offset


@triton.jit
def words_kernel(numbers, out, BLOCK: tl.constexpr):
    quad = tl.arange(0, BLOCK)
    x0, x1, x2, x3 = philox.words(
        tl.load(numbers), quad, tl.load(numbers + 1).to(tl.int32), tl.load(numbers + 2)
    )
    tl.store(out + quad, x0.to(tl.int64))
    tl.store(out + BLOCK + quad, x1.to(tl.int64))
    tl.store(out + 2 * BLOCK + quad, x2.to(tl.int64))
    tl.store(out + 3 * BLOCK + quad, x3.to(tl.int64))


@triton.jit
def normals_kernel(numbers, block, single, first, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    key, path, position = tl.load(numbers), tl.load(numbers + 1).to(tl.int32), tl.load(numbers + 2)
    tl.store(block + lane, philox.normal_block(key, first, path, position, BLOCK))
    tl.store(single + lane, philox.normal_at(key, first + lane, path, position))


@triton.jit
def box_muller_kernel(x, y, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    cosine, sine = philox.box_muller(tl.load(x + lane).to(tl.uint32), tl.load(y + lane).to(tl.uint32))
    tl.store(out + lane, cosine)
    tl.store(out + BLOCK + lane, sine)


@triton.jit
def row_offset_kernel(row, out, size):
    tl.store(out, row_offset(tl.load(row), size))


@triton.jit
def strided_kernel(row, out, stride):
    index = tl.load(row)
    tl.store(out, qk_norm_rope.strided(index, index, index, stride, stride, stride))
