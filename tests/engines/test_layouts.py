"""Losses, gradient norms and every gradient of SOAR are the same at every layout."""

import functools

import pytest
import torch
from engine_cases import make_recipe, train_case
from multirank import run_ranks

LAYOUTS = {  # (TP, PP), processes, sequence parallel
    "tp2": ((2, 1), 2, False),
    "tp2-sp": ((2, 1), 2, True),
    "pp2": ((1, 2), 2, False),
    "dp2": ((1, 1), 2, False),
    "tp2-pp2": ((2, 2), 4, False),
    "tp2-pp2-sp": ((2, 2), 4, True),
    "pp4": ((1, 4), 4, False),
    "pp2-dp2": ((1, 2), 4, False),
}


@functools.cache
def single_process():
    [result] = run_ranks(train_case, 1, make_recipe())
    return result


def assert_gradients_agree(found, expected, tolerance=1e-5):
    """Relative to each gradient's largest entry, and at least 1e-3 of the model's largest (some are truly zero)."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / torch.maximum(gradient.abs().max(), floor)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_layout(layout):
    sizes, processes, sequence_parallel = LAYOUTS[layout]
    expected = single_process()
    ranks = run_ranks(train_case, processes, make_recipe(sizes, sequence_parallel))
    for found in ranks:
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for ours, theirs in zip(found["statistics"], expected["statistics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert_gradients_agree(found["gradients"], expected["gradients"])
