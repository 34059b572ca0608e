"""What a step changes and what it leaves: learning rates, frozen parameters, EMA, steps that are not finite."""

import pytest
import torch
from engine_cases import SIZES, assert_gradients_agree, iterate, make_batch, make_recipe, start_engine

from soar_mega.engines import make_engine
from soar_mega.models.common.conditions import Conditions
from soar_mega.stages import make_stage


def started(**changes):
    recipe = make_recipe(**changes)
    return start_engine(recipe), make_stage(recipe.stage, shift=1.0)


def copies(engine):
    return {name: p.detach().clone() for name, p in engine.parameters.items()}


def test_a_step_is_clipped_adamw():
    engine, stage = started(optimizer={"weight_decay": 0.1})
    before, batch = copies(engine), make_batch(0)
    engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
    gradients = engine.gradients()
    result = engine.step(2e-3)
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
    assert result.ok and result.grad_norm == pytest.approx(norm, rel=1e-6)
    reference = [torch.nn.Parameter(p.clone()) for p in before.values()]
    for p, gradient in zip(reference, gradients.values(), strict=True):
        p.grad = gradient * (0.5 / (norm + 1e-6))  # clip_grad of the recipe
    torch.optim.AdamW(reference, lr=2e-3, weight_decay=0.1).step()
    for p, expected in zip(engine.parameters.values(), reference, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay_all", [True, False])
def test_biases_decay_as_the_recipe_says(decay_all):
    engine, stage = started(optimizer={"decay_all": decay_all, "weight_decay": 0.1})
    before, batch = copies(engine), make_batch(0)
    engine.learn(
        stage.points, lambda p, v: 0.0 * stage.loss(p, v), batch, engine.answer(stage.queries, batch)
    )
    assert engine.step(0.5).ok  # without a gradient, only the decay moves a weight
    for name, parameter in engine.parameters.items():
        factor = 0.95 if decay_all or parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], rtol=1e-6, atol=1e-8)


def test_learning_rates_and_frozen_parameters_by_pattern():
    patterns = {"layers.1.*": 0.5, "layers.*.image.*": 0.1}
    engine, stage = started(
        optimizer={"frozen": ["*_embed*"], "lr_multipliers": patterns, "weight_decay": 0.0}
    )
    before = copies(engine)
    iterate(engine, stage, make_batch(0), lr=1e-3)
    for name, parameter in engine.parameters.items():
        moved = (parameter.detach() - before[name]).abs().max().item()
        # the first step of Adam moves each entry by the learning rate (less where the gradient is tiny)
        expected = 1e-3
        if "_embed" in name or name == "layers.3.text.attention.q_layernorm.weight":  # feeds nothing
            expected = 0.0
        elif ".image." in name:
            expected = 1e-4
        elif name.startswith("layers.1."):
            expected = 5e-4
        assert moved == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("key, value", [("frozen", ["layer.1.*"]), ("lr_multipliers", {"layer.1.*": 0.1})])
def test_a_pattern_that_matches_nothing_is_named(key, value):
    recipe = make_recipe(optimizer={key: value})
    with pytest.raises(ValueError, match=rf"optimizer.{key}: 'layer.1.\*' matches no parameter.*layers\.1\."):
        make_engine(recipe, SIZES)


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        make_engine(make_recipe(optimizer={"frozen": ["*"]}), SIZES)


def test_frozen_embedders_under_recomputation_still_train_the_layers():
    frozen = ["pos_embed.*", "time_text_embed.*", "context_embedder.*"]
    expected, stage = started()
    recomputed, _ = started(optimizer={"frozen": frozen}, model={"recompute_granularity": "full"})
    batch = make_batch(0)
    for engine in (expected, recomputed):
        engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
    gradients = {n: g for n, g in expected.gradients().items() if "embed" not in n}
    assert_gradients_agree(recomputed.gradients(), gradients)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ema_follows_the_main_weights_and_swaps_in(dtype, distributed):
    engine, stage = started(model={"dtype": dtype}, use_distributed_optimizer=distributed)
    engine.keep_weights("ema")
    engine.keep_weights("old")
    main = {name: piece.flat.clone() for name, piece in engine._main.pieces.items()}
    old = {name: value.clone() for name, value in main.items()}
    for iteration in range(2):
        iterate(engine, stage, make_batch(iteration))
        for name, value in main.items():
            value.lerp_(engine._main.pieces[name].flat, 0.25)
    ema = engine.weights["ema"].pieces
    for name, value in main.items():
        assert ema[name].equal(value) and ema[name].dtype == torch.float32
        assert engine.weights["old"].pieces[name].equal(old[name])
    current = copies(engine)
    with engine.using("ema"):
        for name, p in engine.parameters.items():
            assert p.flatten().equal(ema[name].to(p.dtype))
    assert all(p.equal(current[name]) for name, p in engine.parameters.items())
    with pytest.raises(ValueError, match="no weights are kept under the name 'reference'.*ema"):
        engine.using("reference")


def test_velocity_and_answers_use_the_weights_asked_for(monkeypatch):
    engine, stage = started()
    engine.keep_weights("old")
    batch = make_batch(0, invalid=None)
    iterate(engine, stage, batch, lr=1e-2)
    sigma = torch.full((len(batch),), 0.5)
    inputs = (batch.latents, sigma, Conditions(batch.text, batch.pooled))
    current, old = engine.velocity(*inputs), engine.velocity(*inputs, weights="old")
    with torch.no_grad():
        expected = engine.model(batch.latents, sigma * 1000, batch.text, batch.pooled)
    torch.testing.assert_close(current, expected, rtol=1e-5, atol=1e-6)
    sizes, forward = [], engine._pipeline.forward
    monkeypatch.setattr(
        engine._pipeline,
        "forward",
        lambda chunk, given, *rest: sizes.append(len(given[0])) or forward(chunk, given, *rest),
    )
    for most in (None, 3, 8):
        found = engine.velocity(*inputs, micro_batch_size=most)
        torch.testing.assert_close(found, current, rtol=1e-5, atol=1e-6)
    assert sizes == [4, 4, 3, 3, 3, 8]
    monkeypatch.undo()
    assert (current - old).abs().max() > 1e-2
    answers = [engine.answer(stage.queries, batch, weights=name).get(0) for name in ("current", "old")]
    assert (answers[0] - answers[1]).abs().max() > 1e-2


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(culprit):
    engine, stage = started()
    engine.keep_weights("ema")
    iterate(engine, stage, make_batch(0))
    before, ema = copies(engine), {name: kept.clone() for name, kept in engine.weights["ema"].pieces.items()}
    moments = {id(p): s["exp_avg"].clone() for p, s in engine.optimizer.chained_optimizers[0].state.items()}

    def loss(points, velocity):
        losses = stage.loss(points, velocity)
        if culprit == "loss":
            return losses + torch.where(points.sample == 1, torch.inf, 0.0)  # its gradient is finite
        velocity.register_hook(lambda gradient: gradient * torch.nan)
        return losses

    batch = make_batch(1)
    engine.learn(stage.points, loss, batch, engine.answer(stage.queries, batch))
    assert not engine.step(1e-3).ok
    assert all(p.equal(before[name]) for name, p in engine.parameters.items())
    assert all(kept.equal(ema[name]) for name, kept in engine.weights["ema"].pieces.items())
    states = engine.optimizer.chained_optimizers[0].state.items()
    assert all(s["exp_avg"].equal(moments[id(p)]) for p, s in states)
    assert iterate(engine, stage, make_batch(1))[1].ok
