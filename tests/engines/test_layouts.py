"""Losses, gradient norms and every gradient of SOAR are the same at every layout."""

import functools

import pytest
from engine_cases import assert_gradients_agree, make_recipe, train_case
from multirank import run_ranks

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {  # (TP, PP), processes, further settings
    "tp2": ((2, 1), 2, {}),
    "tp2-sp": ((2, 1), 2, {"sequence_parallel": True}),
    "pp2": ((1, 2), 2, {}),
    "dp2": ((1, 1), 2, {}),
    "tp2-pp2": ((2, 2), 4, {}),
    "tp2-pp2-sp": ((2, 2), 4, {"sequence_parallel": True, "model": {"recompute_granularity": "full"}}),
    "pp4": ((1, 4), 4, {}),
    "pp2-dp2-overlap": ((1, 2), 4, OVERLAP),
    "cp2-plain-optimizer": ((1, 1), 2, {"context_parallel_size": 2, "use_distributed_optimizer": False}),
    "cp2-dp2-overlap": ((1, 1), 4, {"context_parallel_size": 2, **OVERLAP}),
    "tp2-cp2-sp": ((2, 1), 4, {"context_parallel_size": 2, "sequence_parallel": True}),
    "pp2-cp2": ((1, 2), 4, {"context_parallel_size": 2, "model": {"recompute_granularity": "full"}}),
    "pp2-vpp2": ((1, 2), 2, VPP2),
    "pp2-vpp2-cp2": ((1, 2), 4, {"context_parallel_size": 2} | VPP2),
    "tp2-pp2-vpp2-sp": ((2, 2), 4, {"sequence_parallel": True, "model": {"recompute_granularity": "full"}} | VPP2),
    "pp2-vpp2-dp2-overlap": ((1, 2), 4, OVERLAP | VPP2),
    "dp2-plain-optimizer": ((1, 1), 2, {"use_distributed_optimizer": False}),
}


def layout_recipe(*layout, **settings):
    """Few micro-batches, for they cost time, but more than stages and with a tail that has to be filled up."""
    return make_recipe(*layout, train={"points_per_micro_batch": 7}, **settings)


@functools.cache
def single_process():
    [result] = run_ranks(train_case, 1, layout_recipe())
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_layout(layout):
    sizes, processes, settings = LAYOUTS[layout]
    expected = single_process()
    iterations = 5 if processes == 2 else 2  # four processes take their time
    ranks = run_ranks(train_case, processes, layout_recipe(sizes, **settings), iterations)
    for found in ranks:
        assert found["norms"] == pytest.approx(expected["norms"][:iterations], rel=1e-5)
        for ours, theirs in zip(found["statistics"], expected["statistics"][:iterations], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert_gradients_agree(found["gradients"], expected["gradients"])


def test_a_stage_with_nothing_to_train():
    """Everything on the first of two stages is frozen; the layers behind it train as in one process."""
    frozen = ["pos_embed*", "time_text*", "context_embedder*", "layers.0.*", "layers.1.*"]
    optimizer = {"frozen": frozen, "lr_multipliers": {"layers.3.*": 0.1}}
    [expected] = run_ranks(train_case, 1, layout_recipe(optimizer=optimizer), 2)
    found, _ = run_ranks(train_case, 2, layout_recipe((1, 2), optimizer=optimizer), 2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert_gradients_agree(found["gradients"], expected["gradients"])


def test_bf16_over_all_kinds_of_parallelism_stays_near_fp32():
    recipe = layout_recipe((2, 2), sequence_parallel=True, model={"dtype": "bf16"})
    found = run_ranks(train_case, 4, recipe, 2)[0]
    expected = single_process()
    for ours, theirs in zip(found["statistics"], expected["statistics"]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert found["norms"] == pytest.approx(expected["norms"][:2], rel=2e-2)
