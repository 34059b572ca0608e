"""Sums of partial sums: more lines than one program reads at a time, and a size that is no multiple of its block."""

import pytest
import torch
from guards import canaries, guarded, worst

from soar_mega.kernels.sums import LINES, sum_lines


@pytest.mark.parametrize(("lines", "shape"), [(1, (3,)), (2 * LINES + 3, (5, 7)), (LINES, (64,))])
def test_sum_matches_float64(interpreted, lines, shape):
    partials = guarded(torch.randn(lines, *shape) + 1)
    with canaries():
        found = sum_lines(partials, torch.float32)
    assert worst(found, partials.double().sum(0)) < 5e-7
