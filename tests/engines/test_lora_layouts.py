"""Adapters train the same at every layout, with both engines; the model without them is their reference."""

import functools
from dataclasses import replace

import pytest
import torch
from engine_cases import (
    PARTS_AGAIN,
    SIZES,
    VPP2,
    assert_training_agrees,
    iterate,
    make_batch,
    make_recipe,
    start_engine,
    train_case,
)
from multirank import run_ranks

from soar_mega.config import LoraConfig
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.gather import full_tensor
from soar_mega.models.common.lora import is_adapter
from soar_mega.models.common.rank_parameters import chunk_parameters
from soar_mega.stages import make_stage

# every kind of linear: fused q, k, v of which one is left out, row-parallel, modulation, shared ones at both ends
LORA = LoraConfig(
    rank=2,
    alpha=3.0,
    dropout=0.2,
    targets=[
        "*.attn.to_[qv]",
        "*.attn.to_out.0",
        "*.attn.add_*",
        "*.ff.net.*",
        "*norm1.linear",
        "time_*",
        "proj_out",
    ],
)
LAYOUTS = {  # (TP, PP), processes, further settings
    "tp2-sp": ((2, 1), 2, {"sequence_parallel": True, "model": PARTS_AGAIN}),
    "pp2": ((1, 2), 2, {}),
    "deepspeed-tp2-sp": ((2, 1), 2, {"sequence_parallel": True, "engine": "deepspeed", "zero_stage": 2}),
    "tp2": ((2, 1), 2, {"model": {"recompute_granularity": "full"}}),
    "cp2": ((1, 1), 2, {"context_parallel_size": 2}),
    "dp2": ((1, 1), 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "pp4": ((1, 4), 4, {}),
    "tp2-pp2-vpp2-sp": ((2, 2), 4, {"sequence_parallel": True, **VPP2}),
    "deepspeed-zero3": ((1, 1), 2, {"engine": "deepspeed", "zero_stage": 3}),
}
FAST = ("tp2-sp",)
SIX_HEADS = replace(SIZES, num_attention_heads=6, caption_projection_dim=24)


def lora_recipe(*layout, lora=LORA, **settings):
    recipe = make_recipe(*layout, **({"train": {"points_per_micro_batch": 7}} | settings))
    recipe.lora = lora
    return recipe


def trained(recipe, iterations):
    """`train_case`, then the reference's and the EMA's answer, and the adapters."""
    found = train_case(recipe, iterations)
    assert all(is_adapter(name) for name in found["gradients"])
    return found


@functools.cache
def single_process():
    [result] = run_ranks(trained, 1, lora_recipe(), 3)
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_training_does_not_depend_on_the_layout(name):
    layout, processes, settings = LAYOUTS[name]
    expected = single_process()
    for found in run_ranks(trained, processes, lora_recipe(layout, **settings), 3 if processes == 2 else 2):
        assert_training_agrees(found, expected)


def kept(recipe):
    """Velocities by the weights of now, by the EMA and by the reference, before and after steps."""
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    batch = make_batch(0, invalid=None)
    engine.keep_weights("ema")
    base = {name: p.detach().clone() for name, p in engine.parameters.items() if not is_adapter(name)}

    def velocity(weights):
        sigma = torch.linspace(0.1, 0.9, len(batch))
        return engine.velocity(batch.latents, sigma, Conditions(batch.text, batch.pooled), weights)

    before = {name: velocity(name) for name in ("current", "ema", "reference")}
    assert torch.equal(before["current"], before["ema"])
    assert (before["reference"] - before["current"]).abs().max() > 1e-3
    for iteration in range(2):
        iterate(engine, stage, make_batch(iteration), lr=1e-2)
    after = {name: velocity(name) for name in ("current", "ema", "reference")}
    assert torch.equal(after["reference"], before["reference"])
    with engine.using("reference"):
        assert torch.equal(velocity("ema"), after["ema"])
        assert torch.equal(velocity("current"), after["reference"])
    assert not torch.equal(after["ema"], after["current"])
    assert all(torch.equal(engine.parameters[name], p) for name, p in base.items())
    answers = engine.answer(stage.queries, batch, weights="reference")
    engine.learn(stage.points, stage.loss, batch, answers)
    by_reference = engine.gradient_norms()
    engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
    assert by_reference != engine.gradient_norms()
    merged = engine.exported("ema")
    weights = {n: full_tensor(merged(n), like=engine.parameters[n]) for n in base}
    return after, weights, engine.base


def test_reference_and_average_need_no_other_model():
    """Also with PP 2, whose ranks hold the same weights as one process, merged ones too, and tell the same base."""
    recipe = lora_recipe(train={"points_per_micro_batch": 8})
    [(expected, weights, base)] = run_ranks(kept, 1, recipe)
    ranks = run_ranks(kept, 2, lora_recipe((1, 2), train={"points_per_micro_batch": 8}))
    merged = {}
    for velocities, mine, found in ranks:
        assert found == base
        merged |= mine
        for name, velocity in expected.items():
            torch.testing.assert_close(velocities[name], velocity, rtol=1e-4, atol=1e-5)
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-5)


def test_initial_adapters_are_keyed_by_name():
    """What a rank draws is its part of what one process draws; so is what it leaves out of a step."""
    recipes = [lora_recipe(), lora_recipe((2, 1), sequence_parallel=True)]
    [expected] = run_ranks(drawn, 1, recipes[0])
    for found in run_ranks(drawn, 2, recipes[1]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def drawn(recipe):
    from soar_mega.distributed import start_world
    from soar_mega.engines import make_engine

    start_world(recipe.parallel)
    engine = make_engine(recipe, SIZES)
    found = {name: full_tensor(engine.parameters[name]).clone() for name in engine.adapters.names}
    assert all(t.abs().max() > 0 if name.endswith("_A") else not t.any() for name, t in found.items())
    return found


def assert_counted(recipe):
    """What a run tells of its memory when it starts is counted beside the model, in the same groups."""
    engine = start_engine(recipe, SIX_HEADS)
    [counted] = chunk_parameters(SIX_HEADS, recipe, rank=0)
    assert counted == [(p.numel(), p.requires_grad) for p in engine.parameters.values()]


def test_parameters_are_counted_where_ranks_are_no_divisor_of_the_head_size():
    """Six heads of four features on three ranks."""
    run_ranks(assert_counted, 3, lora_recipe((3, 1)))


def left_out(recipe, *firsts):
    """The masks of steps whose global batches begin at `firsts` of the training sequence, each sample in two rows."""
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    batch = make_batch(0, recipe.train.global_batch_size, invalid=None)
    rows = torch.arange(len(batch)).repeat_interleave(2)
    taken = {name: getattr(batch, name)[rows] for name in ("valid", "latents", "text", "pooled")}
    masks = []
    for first in firsts:
        step = replace(batch, position=(batch.position + first)[rows], **taken)
        engine.learn(stage.points, stage.loss, step, engine.answer(stage.queries, step))
        masks.append(torch.cat([one.kept.flatten() for one in engine.adapters.members.values()]))
    return masks


def test_replicas_leave_out_the_same_after_a_resume_with_another_global_batch():
    """A run took one step of four samples, and goes on in steps of six."""
    recipe = lora_recipe(train={"global_batch_size": 6, "micro_batch_size": 1})
    [[before, after]] = run_ranks(left_out, 1, recipe, 0, 4)
    assert not torch.equal(before, after)
    for [found] in run_ranks(left_out, 2, recipe, 4):
        assert torch.equal(found, after)
