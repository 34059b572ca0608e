"""Weights are cast to FP8 again whenever an engine has changed them, and at no other time.

Over a stand-in whose linears multiply by what was cast last: one forgotten cast, and the numbers differ.
"""

import sys
from pathlib import Path

import pytest
import torch
from engine_cases import iterate, make_batch, make_recipe, start_engine

sys.path.append(str(Path(__file__).parents[1] / "models"))
import te_stand_in

from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.te_layers import CastOnce
from soar_mega.stages import make_stage

FP8 = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}


def run(parallel, model):
    """Three steps, and after each what the model says by several weights; then by weights that are loaded."""
    recipe = make_recipe(model={"dtype": "bf16", **model}, **parallel)
    engine = start_engine(recipe)
    engine.keep_weights("ema")
    stage = make_stage(recipe.stage, shift=1.0)
    found = []
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (6, 12), (10,))]

    def say(weights):
        latents, text, pooled = states
        return engine.velocity(latents, torch.tensor([0.3, 0.6]), Conditions(text, pooled), weights=weights)

    for iteration in range(3):
        statistics, result = iterate(engine, stage, make_batch(iteration), lr=1e-2)
        assert result.ok
        found += [torch.tensor(statistics["loss"]), say("current"), say("ema"), say("current")]
    kept = {name: torch.full_like(p, 0.1) for name, p in engine.parameters.items()}
    engine.load_weights({"model": kept})
    return [*found, say("current")], engine, stage


RECOMPUTED = {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    ("parallel", "model", "in_products"),
    [
        ({}, {}, True),
        ({"overlap_grad_reduce": True}, RECOMPUTED, False),
        ({"engine": "deepspeed", "zero_stage": 2}, {}, False),
    ],
    ids=["megatron", "megatron recomputed", "deepspeed"],
)
def test_an_engine_computes_with_the_weights_it_has(parallel, model, in_products, monkeypatch):
    """Wherever gradients of weights are added up: in the product that makes them, or behind it."""
    expected, *_ = run(parallel, model)
    record = te_stand_in.install(monkeypatch)
    found, engine, stage = run(parallel, FP8 | model)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    linears = [module for module in engine.model.modules() if isinstance(module, CastOnce)]
    assert all(linear.fuse_wgrad_accumulation == in_products for linear in linears)

    def casts():
        count = len(record.casts)
        record.casts.clear()
        return count / len(linears)

    iterate(engine, stage, make_batch(3))
    casts()
    iterate(engine, stage, make_batch(4))
    assert casts() == 1  # for answers and for learning
    with engine.using("ema"):
        pass
    answers = engine.answer(stage.queries, make_batch(5))
    assert casts() == 1
    engine.learn(stage.points, stage.loss, make_batch(5), answers)
    monkeypatch.setattr(engine, "_statistics", {"loss": float("nan")})
    assert not engine.step(1e-2).ok
    engine.answer(stage.queries, make_batch(6))
    assert casts() == 0  # nothing has changed
