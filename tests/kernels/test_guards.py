"""The bound on a kernel's result: rounding to nearest passes, also at near-ties; cutting off and wrong entries fail."""

import math

import pytest
import torch
from guards import assert_close


@pytest.fixture
def exact():
    """Values of every size, the last thousand halfway between two bfloat16 numbers."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rounded = values[:1000].bfloat16().double()
    half_a_digit = torch.ldexp(torch.ones_like(rounded), torch.frexp(rounded).exponent - 9)
    return torch.cat([values, rounded + half_a_digit])


def cut_off(x):
    return (x.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def test_rounding_to_nearest_passes_and_cutting_off_does_not(exact):
    assert_close(exact.bfloat16(), exact)
    with pytest.raises(AssertionError, match="more than allowed"):
        assert_close(cut_off(exact), exact)


def test_a_float32_error_may_turn_a_near_tie(exact):
    """Two correct kernels differ in the last bit of float32, and so by a whole digit of bfloat16 here and there."""
    one, other = ((exact * (1 + sign * 2**-23)).bfloat16() for sign in (-1, 1))
    assert not torch.equal(one, other)
    for found in (one, other):
        assert_close(found, exact)


def test_the_interpreter_cuts_off(exact, interpreted):
    assert_close(cut_off(exact), exact)
    with pytest.raises(AssertionError, match="more than allowed"):
        assert_close((exact * (1 + 2**-7)).bfloat16(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.5])
def test_one_wrong_entry_fails(exact, dtype, wrong):
    found = exact.to(dtype)
    assert_close(found, exact)
    found[17] = wrong
    with pytest.raises(AssertionError, match="more than allowed"):
        assert_close(found, exact)
