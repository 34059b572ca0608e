"""One step of the engine in one process: its gradients, how it cuts the points, and what it never holds."""

import weakref
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
from engine_cases import (
    SOAR,
    assert_gradients_agree,
    iterate,
    make_batch,
    make_recipe,
    settings_of_soar,
    start_engine,
)
from point_sources import gather_sources

from soar_mega.distributed import start_world
from soar_mega.engines.plan import fill_up, in_order, needs_answer
from soar_mega.engines.statistics import StepStatistics, loss_names, quantiles
from soar_mega.flow import SOURCES, normal
from soar_mega.kernels.point_tables import ANSWER
from soar_mega.stages import MixFlowConfig, SftConfig, SftMultiConfig, SoarConfig, make_stage
from soar_mega.stages.latent_sources import Sources


def learned(recipe, batch=None):
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    batch = batch or make_batch(0)
    statistics = engine.learn(stage.points, stage.loss, batch, engine.answer(stage.queries, batch))
    return engine, statistics


def plain_loss(model, stage, batch):
    """The objective by plain autograd: one forward per branch where the stage asks, one over all points."""
    valid = batch.valid[:, None, None, None]
    batch = replace(batch, latents=torch.where(valid, batch.latents, 0.0))
    z0, z1 = batch.latents, normal(batch.seed, "noise", batch.position, 0, batch.latent_shape)
    asked, points = stage.queries(batch), stage.points(batch)

    def predict(states, timestep, sample, dropped):
        text = torch.where(dropped[:, None, None], batch.empty_text, batch.text[sample])
        pooled = torch.where(dropped[:, None], batch.empty_pooled, batch.pooled[sample])
        return model(states, timestep.float(), text, pooled)

    v_cond = v_uncond = None
    if asked is not None:
        everyone, sigma = torch.arange(len(batch)), asked.rows[:, SOURCES.index("z1")].float()
        sigma = sigma[:, None, None, None]
        with torch.no_grad():
            state = (1 - sigma) * z0 + sigma * z1
            v_cond = predict(state, asked.timestep, everyone, asked.dropped)
            v_uncond = predict(state, asked.timestep, everyone, torch.ones_like(asked.dropped))
    points.sources = gather_sources(batch, points, v_uncond, v_cond)
    velocity = predict(points.states(), points.timestep, points.sample, points.dropped)
    errors = (velocity - points.targets()).square().mean(dim=(1, 2, 3))
    return (errors.double() * points.weight).sum() / points.count.sum()


@pytest.mark.parametrize(
    "settings",
    [
        SOAR,
        settings_of_soar(SftConfig),
        settings_of_soar(SftMultiConfig),
        MixFlowConfig(condition_dropout=0.3),
    ],
    ids=lambda settings: settings.name,
)
def test_gradients_are_those_of_plain_autograd(settings):
    recipe = make_recipe(stage=settings)
    engine, statistics = learned(recipe)
    found = engine.gradients()
    for parameter in engine.parameters.values():
        del parameter.main_grad  # or the model would add to it in place of what torch does
    loss = plain_loss(engine.model, make_stage(recipe.stage, shift=1.0), make_batch(0))
    gradients = torch.autograd.grad(loss, list(engine.parameters.values()))
    assert statistics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradients_agree(found, dict(zip(engine.parameters, gradients, strict=True)))


@pytest.mark.parametrize("answers, points", [(1, 1), (3, 5), (8, 40)])
def test_gradients_do_not_depend_on_the_cutting(answers, points):
    expected, before = learned(make_recipe())
    found, after = learned(make_recipe(train={"micro_batch_size": answers, "points_per_micro_batch": points}))
    assert after == pytest.approx(before, rel=1e-6)
    assert_gradients_agree(found.gradients(), expected.gradients())


def test_soar_without_auxiliary_points_is_bitwise_sft():
    weights = []
    for stage_config in (SoarConfig(num_auxiliary_points=0), SftConfig()):
        engine = start_engine(make_recipe(stage=stage_config))
        stage = make_stage(stage_config, shift=1.0)
        losses = [iterate(engine, stage, make_batch(i))[0]["loss"] for i in range(2)]
        weights.append((losses, [p.detach().clone() for p in engine.parameters.values()]))
    (soar_losses, soar), (sft_losses, sft) = weights
    assert soar_losses == sft_losses
    assert all(torch.equal(a, b) for a, b in zip(soar, sft, strict=True))


def test_control_arm_trains_without_asking():
    settings = settings_of_soar(SftMultiConfig)
    engine, stage = start_engine(make_recipe(stage=settings)), make_stage(settings, shift=1.0)
    batch = make_batch(0)
    assert engine.answer(stage.queries, batch) is None
    statistics = engine.learn(stage.points, stage.loss, batch, None)
    assert statistics["points"] == learned(make_recipe())[1]["points"]


def test_rollout_builds_no_graph_and_keeps_no_answer_too_long():
    recipe = make_recipe()
    engine, stage, batch = start_engine(recipe), make_stage(recipe.stage, shift=1.0), make_batch(0)
    answers = engine.answer(stage.queries, batch)
    held = [answers.get(i) for i in range(4)]
    assert all(v.grad_fn is None and not v.requires_grad for v in held)
    assert held[0].shape == (4, *batch.latent_shape)  # both branches of two samples
    memory = weakref.ref(held.pop().untyped_storage())
    held.clear()

    seen = []

    def loss(points, velocity):
        seen.append((points.of_kind("aux").any().item(), points.sources.v_cond is not None))
        return stage.loss(points, velocity)

    engine.learn(stage.points, loss, batch, answers)
    assert len(seen) == 14  # 40 points by three
    assert seen == sorted(seen) and (True, True) in seen and (False, True) not in seen
    assert memory() is None


def test_points_that_need_no_answer_read_none():
    """An answer that is not a number spoils the points of its own samples alone."""
    recipe = make_recipe(train={"points_per_micro_batch": 40})
    engine, stage, batch = start_engine(recipe), make_stage(recipe.stage, shift=1.0), make_batch(0)
    answers = engine.answer(stage.queries, batch)
    answers.get(3).fill_(torch.nan)  # of samples 6 and 7
    engine.learn(stage.points, stage.loss, batch, answers)
    points, losses = engine.learned
    assert losses.isnan().equal(needs_answer(points) & (points.sample >= 6))


def test_targets_exist_for_one_micro_batch_at_a_time(monkeypatch):
    """And with the fused loss not even for those."""
    made, original = [], Sources.combine

    def combine(self, table, dtype=torch.float32, patch_size=None):
        made.append((len(table), patch_size))
        return original(self, table, dtype, patch_size)

    monkeypatch.setattr(Sources, "combine", combine)
    learned(make_recipe())
    # queries of both branches, then states: as the model reads them
    assert made == [(4, 2)] * 4 + [(3, 2)] * 14
    made.clear()
    learned(make_recipe(stage=replace(SOAR, fused_kernels=False)))
    assert [size for size, _ in made] == [4] * 4 + [3] * 28  # each micro-batch's targets too


def sources_of(points, batch):
    """The six sources of the points of a micro-batch, each [M, C, H, W]; no velocity where no row reads an answer."""
    sources, position = points.sources, batch.position[points.sample]
    answer = sources.states.column(ANSWER)
    velocities = [None if v is None else v[answer] for v in (sources.v_uncond, sources.v_cond)]
    z1, eps, z1_aux = (
        normal(batch.seed, stream, position, path, batch.latent_shape)
        for stream, path in (("noise", 0), ("rollout", points.path), ("endpoint", points.path))
    )
    return sources.z0[points.sample], z1, *velocities, eps, z1_aux


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_and_targets_are_exact_whatever_the_model_computes_in(dtype):
    recipe = make_recipe(model={"dtype": dtype})
    engine, stage, batch = start_engine(recipe), make_stage(recipe.stage, shift=1.0), make_batch(0)
    worst = []

    def loss(points, velocity):
        assert velocity.dtype == torch.float32
        read = sources_of(points, batch)
        for rows, made in ((points.state_rows, points.states()), (points.target_rows, points.targets())):
            terms = [
                row[:, None, None, None] * source.double()
                for row, source in zip(rows.unbind(-1), read, strict=True)
                if source is not None
            ]
            exact, largest = sum(terms), sum(term.abs() for term in terms).max()
            worst.append(((made.double() - exact).abs().max() / largest).item())
        return stage.loss(points, velocity)

    engine.learn(stage.points, loss, batch, engine.answer(stage.queries, batch))
    assert max(worst) < 1e-6


def test_order_and_cut():
    recipe = make_recipe()
    start_world(recipe.parallel)
    stage, batch = make_stage(recipe.stage, shift=1.0), make_batch(0)
    whole = stage.points(batch)
    shuffled = whole.take(torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)))
    ordered = in_order(shuffled)
    assert ordered.kind.tolist() == [0] * 8 + [1] * 32
    assert ordered.sample[8:].tolist() == sorted(ordered.sample[8:].tolist())
    whole = fill_up(ordered, 7)
    assert len(whole) == 42 and len(fill_up(ordered, 7, 4)) == 56
    assert whole.weight[:40].equal(ordered.weight) and whole.count[:40].equal(ordered.count)
    assert not whole.weight[40:].any() and not whole.count[40:].any()


def test_a_velocity_in_the_state_or_the_target_needs_an_answer():
    recipe = make_recipe()
    start_world(recipe.parallel)
    points = make_stage(recipe.stage, shift=1.0).points(make_batch(0)).take(slice(len(SOURCES)))
    each = torch.eye(len(SOURCES), dtype=torch.float64)
    none, reads = torch.zeros_like(each), torch.tensor([source.startswith("v_") for source in SOURCES])
    assert reads.sum() == 2
    for state_rows, target_rows in ((each, none), (none, each)):
        assert needs_answer(replace(points, state_rows=state_rows, target_rows=target_rows)).equal(reads)


def test_statistics_are_means_over_the_points_that_are_present():
    recipe = make_recipe()
    engine, stage, batch = start_engine(recipe), make_stage(recipe.stage, shift=1.0), make_batch(0)

    def points(batch):
        made = stage.points(batch)
        made.sigma[0] = 1.0  # the end of the last quartile
        return made

    found = engine.learn(points, stage.loss, batch, engine.answer(stage.queries, batch))
    learned, losses = engine.learned
    columns = zip(
        losses.tolist(), *(getattr(learned, name).tolist() for name in ("kind", "sigma", "count", "weight"))
    )
    by_name, total, normaliser = {}, 0.0, 0.0
    for loss, kind, sigma, count, weight in columns:
        if count:
            for part in ("", f"_q{min(int(4 * sigma) + 1, 4)}"):
                by_name.setdefault(f"loss/{learned.kinds[kind]}{part}", []).append(loss)
        total, normaliser = total + weight * loss, normaliser + count
    expected = {name: mean(each) for name, each in by_name.items()}
    expected |= {"loss": total / normaliser, "points": len(by_name["loss/base"] + by_name["loss/aux"])}
    assert dict(found) == pytest.approx(expected, rel=1e-12) and len(found) == len(expected) > 8
    strength = learned.measured["k"][(learned.count > 0) & (learned.kind == 1)]
    of_k = {f"k/q{percent:02}": np.percentile(strength, percent) for percent in (5, 50, 95)}
    assert quantiles(learned) == pytest.approx(of_k, rel=1e-12)
    # and where nothing is present
    assert quantiles(replace(learned, count=torch.zeros_like(learned.count))) == {}
    nothing = torch.zeros(2 + 2 * len(loss_names(learned.kinds)) + 1, dtype=torch.float64)
    nothing[0] = 1.0
    assert dict(StepStatistics(learned.kinds, nothing, ("ratio",))) == {"loss": 0.0, "points": 0.0}


def test_losses_can_read_extra_tensors():
    recipe = make_recipe(stage=settings_of_soar(SftConfig))
    engine, stage, batch = start_engine(recipe), make_stage(recipe.stage, shift=1.0), make_batch(0)
    advantage = torch.linspace(-1.0, 2.0, len(batch))

    def points(batch):
        return replace(stage.points(batch), extra={"advantage": advantage})

    def loss(points, velocity):
        return points.extra["advantage"] * stage.loss(points, velocity)

    plain = []
    engine.learn(stage.points, lambda p, v: plain.append(stage.loss(p, v)) or plain[-1], batch, None)
    errors = torch.cat(plain).detach()[:8].double()
    statistics = engine.learn(points, loss, batch, None)
    weight = stage.points(batch).weight
    assert statistics["loss"] == pytest.approx(((advantage * errors) * weight).sum().item() / 7, rel=1e-6)
