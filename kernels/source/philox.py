"""The normal numbers of `soar_mega.flow.noise`, made in registers: equal words, normals to 1e-6.

All arithmetic is float32 without a call into a device library: the angle is reduced to an eighth of a turn in
integers, where sine and cosine are short polynomials, so nothing spills to a table in local memory.
"""

import triton
import triton.language as tl


@triton.jit
def normal_block(key, first, path, position, BLOCK: tl.constexpr):
    """[BLOCK] float32 normals of elements first ... first + BLOCK - 1; first and BLOCK are multiples of 4.

    key: int64, low word first. path: int32. position: int64, the sample's place in the training sequence.
    """
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    n0, n1, n2, n3 = normal_lanes(key, quad, path, position)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def normal_at(key, element, path, position):
    """The same numbers at any elements, of any shape; each draws the words of its own block of four."""
    x0, x1, x2, x3 = words(key, element // 4, path, position)
    upper = (element & 2) != 0
    cosine, sine = box_muller(tl.where(upper, x2, x0), tl.where(upper, x3, x1))
    return tl.where((element & 1) != 0, sine, cosine)


@triton.jit
def normal_lanes(key, quad, path, position):
    """The four lanes of Philox counters (quad, path, position low, position high)."""
    x0, x1, x2, x3 = words(key, quad, path, position)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return n0, n1, n2, n3


@triton.jit
def words(key, quad, path, position):
    """Philox4x32-10 words, each uint32 of the shape of quad."""
    zero = quad * 0
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(
        key,
        quad.to(tl.uint32),
        (zero + path).to(tl.uint32),
        zero.to(tl.uint32) + low,
        zero.to(tl.uint32) + high,
    )


@triton.jit
def box_muller(x, y):
    """(r cos(theta), r sin(theta)), r = sqrt(-2 ln((x + .5) 2^-32)), theta = 2 pi (y + .5) 2^-32."""
    radius = tl.sqrt(-2.0 * log_unit(x))
    cosine, sine = turn(y)
    return radius * cosine, radius * sine


@triton.jit
def log_unit(x):
    """ln((x + .5) 2^-32) of uint32 words; above one half from the distance to 1, which the word holds exactly."""
    low = x < 0x80000000
    distance = tl.where(low, x, 0xFFFFFFFF - x).to(tl.float32)  # of a word below 2^31
    small = (distance + 0.5) * 2.3283064365386963e-10
    u = 1.0 - small
    # Kahan's log1p(-small): the rounding of u is undone, since 1 - u is exact
    step = 1.0 - u
    near_one = tl.where(step == 0.0, -small, tl.log(u) * (small / tl.where(step == 0.0, 1.0, step)))
    return tl.where(low, tl.log(small), near_one)


@triton.jit
def turn(y):
    """(cos, sin) of 2 pi (y + .5) 2^-32, y uint32: quadrant and remainder are split in integers."""
    signed = y.to(tl.int32, bitcast=True)
    quadrant = ((signed >> 29) + 1) >> 1  # round(signed / 2^30): -2 ... 2
    rest = signed - (quadrant << 30)  # [-2^29, 2^29), wraps around with the quadrant
    angle = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09  # pi 2^-31: |angle| <= pi / 4
    square = angle * angle
    # Taylor to degree 9 and 8 leaves 3e-9 and 3e-8 at pi / 4: below the rounding of float32
    sine = angle + angle * square * (
        -0.16666667 + square * (0.008333334 + square * (-0.00019841270 + square * 2.7557319e-06))
    )
    cosine = 1.0 + square * (
        -0.5
        + square
        * (0.041666668 + square * (-0.0013888889 + square * (2.4801587e-05 - square * 2.7557319e-07)))
    )
    swap = (quadrant & 1) != 0
    first, second = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    # quadrant 0: (c, s); 1: (-s, c); 2: (-c, -s); 3: (s, -c)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return first, second
