"""Losses, gradient norms and every gradient of SOAR are the same at every layout."""

import functools

import pytest
from engine_cases import assert_gradients_agree, make_recipe, train_case
from multirank import run_ranks

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {  # (TP, PP), processes, further settings
    "tp2": ((2, 1), 2, {}),
    "tp2-sp": ((2, 1), 2, {"sequence_parallel": True}),
    "pp2": ((1, 2), 2, {}),
    "dp2": ((1, 1), 2, {}),
    "tp2-pp2": ((2, 2), 4, {}),
    "tp2-pp2-sp": ((2, 2), 4, {"sequence_parallel": True, "model": {"recompute_granularity": "full"}}),
    "pp4": ((1, 4), 4, {}),
    "pp2-dp2-overlap": ((1, 2), 4, OVERLAP),
    "dp2-plain-optimizer": ((1, 1), 2, {"use_distributed_optimizer": False}),
}


@functools.cache
def single_process():
    [result] = run_ranks(train_case, 1, make_recipe())
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_layout(layout):
    sizes, processes, settings = LAYOUTS[layout]
    expected = single_process()
    ranks = run_ranks(train_case, processes, make_recipe(sizes, **settings))
    for found in ranks:
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for ours, theirs in zip(found["statistics"], expected["statistics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert_gradients_agree(found["gradients"], expected["gradients"])
