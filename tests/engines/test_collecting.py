"""Methods that learn from samples of their own at every layout: guided points, further answers, what is observed."""

import functools
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from collecting_cases import (
    GUIDANCE,
    LORA,
    REFERENCE_GUIDANCE,
    Collecting,
    answered,
    collected_batch,
    collecting_case,
    collecting_recipe,
    learn_once,
    log_probability,
    objective,
    with_kept_weights,
)
from engine_cases import VPP2, assert_gradients_agree, make_batch, make_recipe, start_engine
from multirank import run_ranks
from repeated_work import RepeatedWork

from soar_mega.engines.plan import order_of
from soar_mega.flow import normal
from soar_mega.models.common.answering import answering, is_answering
from soar_mega.models.common.layer_graphs import LayerGraphs
from soar_mega.stages import make_stage


def in_double(engine, batch, detach):
    """The step by plain autograd in float64: each branch and each copy of the weights in a forward of its own."""
    model, stage = engine.model, Collecting(detach)
    names = list(engine.parameters)
    mine = {name: p.detach().double() for name, p in engine.parameters.items()}
    kept = {
        name: {key: piece.double().view(mine[key].shape) for key, piece in one.pieces.items()}
        for name, one in engine.weights.items()
    }
    for parameter in engine.parameters.values():
        del parameter.main_grad  # or the model would add to it in place of what torch does
    model.double()
    [chunk] = model.chunks
    chunk.config.params_dtype = torch.float64
    given = replace(batch, latents=torch.where(batch.valid[:, None, None, None], batch.latents, 0.0))
    points = stage.points(given)
    row = points.sample
    eps = normal(batch.seed, "rollout", batch.position[row], points.path, batch.latent_shape)
    states = given.latents[row].double() + 0.3 * points.path[:, None, None, None] * eps.double()

    def predict(dropped):
        text = torch.where(dropped[:, None, None], batch.empty_text, batch.text[batch.prompt[row]])
        pooled = torch.where(dropped[:, None], batch.empty_pooled, batch.pooled[batch.prompt[row]])
        return model(states, points.timestep, text.double(), pooled.double())

    everywhere = torch.ones_like(points.dropped)

    def both(scale):
        uncond = predict(everywhere)
        uncond = uncond.detach() if detach else uncond
        return uncond + scale * (predict(points.dropped) - uncond)

    def with_weights(values, call):
        with torch.no_grad():
            for name, value in values.items():
                engine.parameters[name].copy_(value)
            return call()

    by_reference = with_weights(kept["reference"], lambda: both(REFERENCE_GUIDANCE))
    by_old = with_weights(kept["old"], lambda: predict(points.dropped))
    with_weights(mine, lambda: None)
    velocity = both(GUIDANCE)
    following = given.latents.double()[points.extra["following"]]
    measured = log_probability(states, following, velocity)
    found = objective(measured, points.extra, velocity, by_reference, by_old)
    total = points.count.sum()
    loss = (found["loss"] * points.weight).sum() / total
    gradients = torch.autograd.grad(loss, list(engine.parameters.values()), allow_unused=True)
    observed = {name: ((found[name] * points.count).sum() / total).item() for name in stage.observes}
    return loss.item(), observed, dict(zip(names, gradients, strict=True)), measured.detach()


@pytest.mark.parametrize("detach", [False, True], ids=["both-branches", "unconditional-detached"])
def test_a_step_is_that_of_plain_autograd_in_float64(detach):
    recipe = collecting_recipe(model={"fused_kernels": False})
    engine, stage, batch = with_kept_weights(recipe), Collecting(detach), collected_batch()
    measured = engine.measure(stage.points, stage.log_probability, batch)
    statistics, gradients = learn_once(engine, stage, batch), engine.gradients()
    loss, observed, expected, by_double = in_double(engine, batch, detach)
    assert statistics["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in observed.items():
        assert statistics[name] == pytest.approx(value, rel=1e-5)
    assert_gradients_agree(gradients, expected)
    torch.testing.assert_close(measured, by_double, rtol=1e-5, atol=1e-6)


LAYOUTS = {  # (TP, PP), processes, further settings
    "tp2-sp": ((2, 1), 2, {"sequence_parallel": True}),
    "pp2-vpp2": ((1, 2), 2, VPP2),
    "zero3": ((1, 1), 2, {"engine": "deepspeed", "zero_stage": 3}),
    "tp2": ((2, 1), 2, {}),
    "pp2": ((1, 2), 2, {"overlap_rollout": True}),
    "cp2": ((1, 1), 2, {"context_parallel_size": 2}),
    "dp2": ((1, 1), 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2-plain-optimizer": (
        (1, 1),
        2,
        {
            "use_distributed_optimizer": False,
            "train": {"micro_batch_size": 3, "points_per_micro_batch": 3, "offload_kept_weights": True},
        },
    ),
    "zero1": ((1, 1), 2, {"engine": "deepspeed", "zero_stage": 1}),
    "zero2": ((1, 1), 2, {"engine": "deepspeed", "zero_stage": 2}),
    "tp2-pp2-sp": ((2, 2), 4, {"sequence_parallel": True}),
    "cut-otherwise": ((1, 1), 1, {"train": {"micro_batch_size": 8, "points_per_micro_batch": 5}}),
}
FAST = ("pp2-vpp2", "zero3", "cut-otherwise")
WITH_ADAPTERS = ("pp2", "pp2-vpp2", "cp2", "dp2", "zero1", "zero2", "zero3")


@functools.cache
def one_process(lora: bool):
    [found] = run_ranks(collecting_case, 1, collecting_recipe(lora=LORA if lora else None))
    return found


@pytest.mark.parametrize(
    ("layout", "lora"),
    [
        pytest.param(name, lora, marks=() if name in FAST and not lora else pytest.mark.slow)
        for lora, names in ((False, LAYOUTS), (True, WITH_ADAPTERS))
        for name in names
    ],
)
def test_a_step_does_not_depend_on_the_layout(layout, lora):
    sizes, processes, settings = LAYOUTS[layout]
    expected = one_process(lora)
    recipe = collecting_recipe(sizes, lora=LORA if lora else None, **settings)
    measured = []
    for found in run_ranks(collecting_case, processes, recipe):
        assert found["statistics"] == pytest.approx(expected["statistics"], rel=1e-5)
        assert_gradients_agree(found["gradients"], expected["gradients"])
        measured.append(found["measured"])
    replicas = 2 if "dp2" in layout or "zero" in layout else 1
    if replicas == 1:
        for ours in measured:
            torch.testing.assert_close(ours, expected["measured"], rtol=1e-5, atol=1e-6)
    else:
        # points are row by row, first as they are, then with noise
        ours = torch.cat([part.view(2, -1) for part in measured], dim=1)
        torch.testing.assert_close(ours, expected["measured"].view(2, -1), rtol=1e-4, atol=1e-5)


def test_what_is_measured_is_what_learning_sees():
    """Also where points wait for answers, and are learned from in another order."""
    recipe = make_recipe()
    engine, stage, batch = start_engine(recipe), make_stage(recipe.stage, shift=1.0), make_batch(0)

    def points(batch):
        made = stage.points(batch)
        return made.take(torch.randperm(len(made), generator=torch.Generator().manual_seed(0)))

    measured = engine.measure(points, stage.loss, batch, engine.answer(stage.queries, batch))
    engine.learn(points, stage.loss, batch, engine.answer(stage.queries, batch))
    losses = engine.learned[1]
    assert torch.equal(measured[order_of(points(batch))], losses)
    assert not measured.requires_grad and not losses.requires_grad  # no graph is kept


@pytest.mark.parametrize("recorded", [False, True])
def test_measuring_computes_attention_as_learning_does(monkeypatch, recorded):
    """And not as answers do, which on a GPU take a kernel that training cannot; nor by recordings of answers."""
    answers, recordings = [], []
    record = LayerGraphs._record

    def attentions(device):
        answers.append(is_answering())
        return nullcontext()

    def recording(*args):
        recordings.append(is_answering())
        return record(*args)

    monkeypatch.setattr("soar_mega.models.common.specs.attentions", attentions)
    monkeypatch.setattr(LayerGraphs, "_record", recording)
    engine, stage, batch = with_kept_weights(collecting_recipe()), Collecting(), collected_batch()
    if recorded:
        engine.record_layers(partial(RepeatedWork, engine))
    further = answered(engine, stage, batch)
    with answering():  # in the same shapes
        engine.measure(stage.points, stage.log_probability, batch)
    assert answers and all(answers)
    answers.clear()
    engine.measure(stage.points, stage.log_probability, batch)
    assert set(recordings) == ({True, False} if recorded else set())
    engine.learn(stage.points, stage.loss, batch, None, stage.observes, **further)
    assert answers and not any(answers)
