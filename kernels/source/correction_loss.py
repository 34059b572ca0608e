"""Squared errors against targets that exist in registers only, and their gradient, in one reading of the velocity."""

import triton
import triton.language as tl

from soar_mega.kernels.source.point_tables import (
    coefficient,
    given,
    group_of,
    row_offset,
    shared_part,
    source,
    stochastic_part,
)


@triton.jit
def correction_loss_kernel(
    z0, z1, v_uncond, v_cond, eps, z1_aux, groups, points, velocity, gradient, partial, size,
    DRAW_Z1: tl.constexpr, DRAW_EPS: tl.constexpr, DRAW_Z1_AUX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [P, blocks]: sums of squares; gradient [P, size]. Grid: (blocks of size, groups).

    Every program writes sums of its own, so that adding them up has one order.
    """
    block = tl.program_id(0)
    first = block * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < size
    sample, path, position, point, end, answer = group_of(groups, tl.program_id(1))
    s0 = given(z0, sample, size, element, mask)
    s1 = source(z1, groups + 5, sample, 0, position, size, first, element, mask, DRAW_Z1, BLOCK)
    s2 = given(v_uncond, answer, size, element, mask)
    s3 = given(v_cond, answer, size, element, mask)
    while point < end:
        target = stochastic_part(
            eps, z1_aux, groups, points, point, sample, path, position, size, first, element, mask,
            DRAW_EPS, DRAW_Z1_AUX, BLOCK,
        )  # fmt: skip
        if DRAW_EPS or DRAW_Z1_AUX:
            # making noise takes their registers: they come back from the cache
            s0 = given(z0, sample, size, element, mask)
            s2 = given(v_uncond, answer, size, element, mask)
            s3 = given(v_cond, answer, size, element, mask)
        target += shared_part(points, point, s0, s1, s2, s3, z1, v_uncond, v_cond, DRAW_Z1)
        error = tl.where(mask, given(velocity, point, size, element, mask) - target, 0.0)
        scale = coefficient(points, point, 6) / size  # the weight over the number of elements
        tl.store(partial + row_offset(point, tl.num_programs(0)) + block, tl.sum(error * error) * scale)
        if gradient is not None:
            slope = 2.0 * scale * error
            tl.store(
                gradient + row_offset(point, size) + element, slope.to(gradient.dtype.element_ty), mask=mask
            )
        point += 1
