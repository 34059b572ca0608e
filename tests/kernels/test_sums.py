"""Sums of partial sums: more lines than one program reads at a time, and a size that is no multiple of its block."""

import pytest
import torch
from guards import canaries, guarded, worst

from soar_mega.kernels.sums import LINES, sum_lines


@pytest.mark.parametrize(("lines", "shape"), [(1, (3,)), (2 * LINES + 3, (5, 7)), (LINES, (64,))])
def test_sum_matches_float64(interpreted, lines, shape):
    partials = guarded(torch.randn(lines, *shape) + 1)
    with canaries():
        found, nothing = sum_lines(torch.float32, partials, None)
    assert nothing is None
    assert worst(found, partials.double().sum(0)) < 5e-7


def test_two_sums_of_one_launch(interpreted):
    """Each of its own lines and its own size; blocks of the second follow those of the first."""
    both = [guarded(torch.randn(lines, size) + 1) for lines, size in ((3, 70), (LINES + 5, 33))]
    with canaries():
        found = sum_lines(torch.float32, *both)
    for one, partials in zip(found, both, strict=True):
        assert worst(one, partials.double().sum(0)) < 5e-7
    assert sum_lines(torch.float32, None, None) == [None, None]
