"""Losses, gradient norms and every gradient of SOAR are the same at every layout; test_layout_grid.py has them all."""

import functools

import pytest
import torch
from deepspeed_cases import PATTERNS, behaviour
from engine_cases import (
    PARTS_AGAIN,
    VPP2,
    assert_gradients_agree,
    assert_training_agrees,
    make_recipe,
    train_case,
)
from multirank import run_ranks

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {  # (TP, PP), processes, further settings
    "tp2": ((2, 1), 2, {}),
    "tp2-sp": ((2, 1), 2, {"sequence_parallel": True}),
    "pp2": ((1, 2), 2, {}),
    "dp2": ((1, 1), 2, {}),
    "pp4": ((1, 4), 4, {}),
    "pp2-dp2-overlap": ((1, 2), 4, {"overlap_rollout": True, **OVERLAP}),
    "cp2-plain-optimizer": ((1, 1), 2, {"context_parallel_size": 2, "use_distributed_optimizer": False}),
    "cp2-dp2-overlap": ((1, 1), 4, {"context_parallel_size": 2, **OVERLAP}),
    "tp2-cp2-sp": ((2, 1), 4, {"context_parallel_size": 2, "sequence_parallel": True}),
    "pp2-vpp2": ((1, 2), 2, {"model": PARTS_AGAIN} | VPP2),
    "pp2-vpp2-cp2": (
        (1, 2),
        4,
        {"context_parallel_size": 2, "model": {"recompute_granularity": "full"}} | VPP2,
    ),
    "tp2-pp2-vpp2-sp": (
        (2, 2),
        4,
        {"sequence_parallel": True, "model": {"recompute_granularity": "full"}} | VPP2,
    ),
    "pp2-vpp2-dp2-plain-optimizer": ((1, 2), 4, {"use_distributed_optimizer": False} | VPP2),
}

PLAIN = ("tp2", "pp2", "dp2", "pp4")  # those with more to them have these in them


def layout_recipe(*layout, **settings):
    """Few micro-batches, for they cost time, but more than stages and with a tail that has to be filled up."""
    return make_recipe(*layout, **({"train": {"points_per_micro_batch": 7}} | settings))


@functools.cache
def single_process():
    [result] = run_ranks(train_case, 1, layout_recipe())
    return result


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in PLAIN else ()) for name in LAYOUTS]
)
def test_training_does_not_depend_on_the_layout(layout):
    sizes, processes, settings = LAYOUTS[layout]
    expected = single_process()
    iterations = 5 if processes == 2 else 2  # four processes take their time
    ranks = run_ranks(train_case, processes, layout_recipe(sizes, **settings), iterations)
    for found in ranks:
        assert_training_agrees(found, expected)


@pytest.mark.parametrize("chunks", [{}, VPP2], ids=["one-chunk", "two-chunks"])
def test_a_stage_with_nothing_to_train(chunks):
    """Everything on the first of two stages, or the first chunks of both, is frozen; the layers behind train."""
    frozen = ["pos_embed*", "time_text*", "context_embedder*", "layers.0.*", "layers.1.*"]
    optimizer = {"frozen": frozen, "lr_multipliers": {"layers.3.*": 0.1}}
    [expected] = run_ranks(train_case, 1, layout_recipe(optimizer=optimizer), 2)
    found, _ = run_ranks(train_case, 2, layout_recipe((1, 2), optimizer=optimizer, **chunks), 2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert_gradients_agree(found["gradients"], expected["gradients"])


def test_every_call_to_an_interleaved_pipeline_answers_as_one_process():
    """Kept weights, velocities, steps that are not finite, with parameters that are gathered while the model runs."""
    [expected] = run_ranks(behaviour, 1, layout_recipe(optimizer=PATTERNS))
    ranks = run_ranks(behaviour, 4, layout_recipe((1, 2), optimizer=PATTERNS, **OVERLAP, **VPP2))
    for found in ranks:
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        velocities = [key for key in expected if "velocity" in key]
        assert len(velocities) == 9
        for key in velocities:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
    for weights in ("current", "ema"):
        held = ranks[0][weights] | ranks[-1][weights]
        assert held.keys() == expected[weights].keys()
        for name, tensor in expected[weights].items():
            # an entry whose gradient is rounding noise may move by a step of Adam in either direction
            assert (held[name] - tensor).abs().mean() < 1e-6, f"{weights} {name}"


def test_bf16_over_all_masks_of_parallelism_stays_near_fp32():
    recipe = layout_recipe((2, 2), sequence_parallel=True, model={"dtype": "bf16"}, **VPP2)
    found = run_ranks(train_case, 4, recipe, 2)[0]
    expected = single_process()
    for ours, theirs in zip(found["statistics"], expected["statistics"]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert found["norms"] == pytest.approx(expected["norms"][:2], rel=2e-2)
