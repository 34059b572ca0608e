"""Squared errors against targets that exist in registers only, and their gradient, in one reading of the velocity."""

import triton
import triton.language as tl

from soar_mega.kernels.source.philox import normal_block
from soar_mega.kernels.source.sources import coefficient, given, group_of, row_offset


@triton.jit
def loss_kernel(
    z0, z1, v_uncond, v_cond, eps, z1_aux, groups, points, velocity, gradient, partial, size,
    DRAW_Z1: tl.constexpr, DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [P, blocks]: sums of squares; gradient [P, size]. Grid: (blocks of size, groups).

    Every program writes sums of its own, so that adding them up has one order.
    """
    first = tl.program_id(0) * BLOCK
    group = tl.program_id(1)
    element = first + tl.arange(0, BLOCK)
    mask = element < size
    sample, path, position, point, end = group_of(groups, group)
    s0 = given(z0, sample, size, element, mask)
    if DRAW_Z1:
        s1 = normal_block(tl.load(groups + 5), first, 0, position, BLOCK)
    else:
        s1 = given(z1, sample, size, element, mask)
    s2 = given(v_uncond, sample, size, element, mask)
    s3 = given(v_cond, sample, size, element, mask)
    while point < end:
        target = coefficient(points, point, 0) * s0
        if DRAW_Z1 or z1 is not None:
            target += coefficient(points, point, 1) * s1
        if v_uncond is not None:
            target += coefficient(points, point, 2) * s2
        if v_cond is not None:
            target += coefficient(points, point, 3) * s3
        if DRAW_EPS:
            noise = normal_block(tl.load(groups + 6), first, path, position, BLOCK)
            target += coefficient(points, point, 4) * noise
        elif eps is not None:
            target += coefficient(points, point, 4) * given(eps, sample, size, element, mask)
        if DRAW_Z1_AUX:
            noise = normal_block(tl.load(groups + 7), first, path, position, BLOCK)
            target += coefficient(points, point, 5) * noise
        elif z1_aux is not None:
            target += coefficient(points, point, 5) * given(z1_aux, sample, size, element, mask)
        error = tl.where(mask, given(velocity, point, size, element, mask) - target, 0.0)
        # the weight comes divided by the number of elements
        scale = coefficient(points, point, 6)
        tl.store(partial + point * tl.num_programs(0) + tl.program_id(0), tl.sum(error * error) * scale)
        if gradient is not None:
            slope = 2.0 * scale * error
            tl.store(
                gradient + row_offset(point, size) + element, slope.to(gradient.dtype.element_ty), mask=mask
            )
        point += 1
