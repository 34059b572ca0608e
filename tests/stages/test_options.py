"""The settings of SOAR that a study varies, each with its control arm, and MixFlow: their points and queries."""

from dataclasses import fields, replace

import pytest
import torch
from test_stages import make_batch, ray, with_answers

from soar_mega.flow import SOURCES, Schedule, normal, uniform
from soar_mega.stages import MixFlowConfig, SftConfig, SftMultiConfig, SoarConfig, make_stage
from soar_mega.stages.points import PER_POINT
from soar_mega.stages.scale import guided_share

VARIED = SoarConfig(
    num_auxiliary_points=3,
    sampling_steps=5,
    guidance_scale={"1": 0.25, "2": 0.25, "4.5": 0.5},
    max_rollout_length=0.6,
    auxiliary_gamma=0.4,
)


def auxiliary_of(stage, batch):
    points = stage.points(batch)
    return points.take(points.of_kind("aux").nonzero().flatten())


def assert_same_points(ours, theirs):
    for name in PER_POINT:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_points_with_every_option_follow_the_method_step_by_step():
    batch = make_batch(32)
    stage = make_stage(VARIED, shift=1.0)
    points = auxiliary_of(stage, batch)
    v_uncond, v_cond = with_answers(batch, points)
    sample, position = points.sample, batch.position
    z0, z1 = batch.latents[sample], normal(3, "noise", position[sample], 0, batch.latent_shape)

    u0 = stage.queries(batch).rows[:, SOURCES.index("z1")]  # sigma, with shift 1 unshifted time
    length = 0.6 * uniform(3, "rollout_length", position)[:, 0]
    floor = Schedule(1.0).sigma_min
    sigma0, sigma1 = u0[sample], (u0 - length).clamp(min=floor).minimum(u0)[sample]
    draws = torch.stack([uniform(3, "auxiliary_slowed", position, 0, 3)], dim=1).flatten()
    noised = points.sigma + 0.4 * draws * (1 - points.sigma)
    scale = stage._guidance(batch)[sample]
    assert {1.0, 2.0, 4.5} == set(scale.tolist())

    def wide(values):
        return values[:, None, None, None]

    v = v_uncond.double() + wide(scale) * (v_cond.double() - v_uncond.double())
    rolled = ray(sigma0, z0, z1) + wide(sigma1 - sigma0) * v
    blend = wide((noised - sigma1) / (1 - sigma1))
    state = (1 - blend) * rolled + blend * z1.double()
    torch.testing.assert_close(points.states().double(), state, rtol=0, atol=5e-6)
    target = (state - z0.double()) / wide(noised)
    worst = (points.targets().double() - target).abs().amax() / target.abs().amax()
    assert worst < 1e-6
    assert torch.equal(points.timestep, 1000 * points.sigma)  # it is told s', not where the state is
    strength = (1 - noised) / (1 - sigma1) * (sigma0 - sigma1) / noised
    torch.testing.assert_close(points.measured["k"], strength)


@pytest.mark.parametrize("one", [{"3.3": 1.0}, [3.3, 3.3], {"3.3": 1.0, "1": 0.0}])
def test_a_distribution_with_one_value_is_the_number_to_the_last_bit(one):
    batch = make_batch(16)
    number, spread = (make_stage(SoarConfig(guidance_scale=g), 3.0) for g in (3.3, one))
    assert_same_points(spread.points(batch), number.points(batch))
    asked, wanted = spread.queries(batch), number.queries(batch)
    assert asked.unconditional is True  # the same forwards
    for field in fields(wanted):
        ours, theirs = getattr(asked, field.name), getattr(wanted, field.name)
        assert torch.equal(ours, theirs) if torch.is_tensor(theirs) else ours == theirs


def test_only_samples_with_a_scale_ask_without_their_prompt():
    batch = make_batch(32)
    stage = make_stage(VARIED, 1.0)
    asked = stage.queries(batch).unconditional
    assert torch.equal(asked, stage._guidance(batch) != 1)
    assert asked.view(4, 8).sum(dim=1).tolist() == [6] * 4  # every replica has the same work
    assert VARIED.forwards().answers == 1.75 and VARIED.forwards().query_branches == 2
    columns = auxiliary_of(stage, batch).state_rows[:, SOURCES.index("v_uncond")]
    assert torch.equal(columns != 0, asked.repeat_interleave(3))


def test_a_range_of_scales_is_uniform():
    batch = make_batch(64)
    scales = make_stage(SoarConfig(guidance_scale=[1.0, 5.0]), 3.0)._guidance(batch)
    assert ((scales - 1) / 4 * 64).floor().sort().values.tolist() == list(range(64))
    assert guided_share([1.0, 5.0]) == 1


@pytest.mark.parametrize("scale", [1.0, [1.0, 1.0], {"1": 1.0}])
def test_nobody_with_a_scale_of_one_is_asked_twice(scale):
    assert guided_share(scale) == 0
    assert make_stage(SoarConfig(guidance_scale=scale), 3.0).queries(make_batch(4)).unconditional is False


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rollout_length": 0.5},
        {"rollout_steps": 3, "sampling_steps": 10},
        {"auxiliary_gamma": 0.3},
        {
            "max_rollout_length": 0.3,
            "auxiliary_gamma": 0.2,
            "num_auxiliary_points": 1,
            "auxiliary_weight": 0.5,
        },
    ],
)
def test_the_control_arm_has_the_same_draws_on_the_ray(settings):
    batch = make_batch(16)
    soar = make_stage(SoarConfig(**settings), 3.0).points(batch)
    control = make_stage(SftMultiConfig(**settings), 3.0).points(batch)
    plain = make_stage(SftMultiConfig(num_auxiliary_points=control.of_kind("aux").sum().item() // 16), 3.0)
    for name in ("sample", "path", "sigma", "timestep", "weight", "count", "dropped"):
        assert torch.equal(getattr(soar, name), getattr(control, name))
    assert bool((control.state_rows[:, 2:] == 0).all()) and bool((soar.state_rows[:, 3] != 0).any())
    # z0 and z1 of a ray add up to one; a rollout of a perfect model is on it, at the same sigma
    velocity = soar.state_rows[:, 2] + soar.state_rows[:, 3]
    torch.testing.assert_close(soar.state_rows[:, 1] + velocity, control.state_rows[:, 1])
    torch.testing.assert_close(soar.state_rows[:, 0] - velocity, control.state_rows[:, 0])
    assert not torch.equal(plain.points(batch).state_rows, control.state_rows)


def test_several_steps_go_where_euler_goes():
    """A linear model v = m z + b, answered step by step as the queries say, against Euler in float64."""
    batch = make_batch(16)
    config = SoarConfig(rollout_steps=4, max_rollout_length=0.7, guidance_scale=[2.0, 4.0])
    stage = make_stage(config, shift=3.0)
    queries, points = stage.queries(batch), auxiliary_of(stage, batch)
    z0, z1 = batch.latents.double(), normal(3, "noise", batch.position, 0, batch.latent_shape).double()
    scale = stage._guidance(batch)[:, None, None, None]

    def model(z, timestep):
        s = timestep[:, None, None, None] / 1000
        return torch.stack([(0.3 - s) * z + 0.1, (1.1 + s) * z - 0.7])

    def combine(rows, mean):
        columns = rows.T[..., None, None, None]
        return sum(c * x for c, x in zip(columns, (z0, z1, mean[0], mean[1]), strict=False))

    mean = model(combine(queries.rows, torch.zeros(2, *z0.shape)), queries.timestep)
    z, times = combine(queries.rows, mean * 0), [queries.timestep, *(step.timestep for step in queries.then)]
    assert len(times) == 4
    for step in queries.then:
        share = step.share[:, None, None, None]
        mean = (1 - share) * mean + share * model(combine(step.rows, mean), step.timestep)
    span = stage._rollout_span(batch)
    ends = [*times, 1000 * span.sigma1]
    # of equal unshifted time, but for those that reach the floor
    lengths = -torch.stack([stage.schedule.unshift(end / 1000) for end in ends]).diff(dim=0)
    free = span.sigma1 > stage.schedule.sigma_min
    assert int(free.sum()) >= 8
    torch.testing.assert_close(lengths[:, free], lengths[:, free].mean(dim=0).expand(4, -1))
    for here, end in zip(times, ends[1:], strict=True):
        v_uncond, v_cond = model(z, here)
        z = z + ((end - here) / 1000)[:, None, None, None] * (v_uncond + scale * (v_cond - v_uncond))

    sample = points.sample
    blend = ((points.sigma - span.sigma1[sample]) / (1 - span.sigma1[sample]))[:, None, None, None]
    state = (1 - blend) * z[sample] + blend * z1[sample]
    columns = points.state_rows.T[..., None, None, None]
    sources = (z0, z1, mean[0], mean[1])
    found = sum(c * x[sample] for c, x in zip(columns, sources, strict=False))
    torch.testing.assert_close(found, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("times", [{"timestep_density": "uniform"}, {"logit_mean": -10.0}])
def test_steps_of_length_zero_and_a_rollout_to_the_floor_are_finite(times):
    """Also of rollouts that begin at the floor."""
    batch = make_batch(64)
    config = SoarConfig(rollout_steps=5, max_rollout_length=1.0, **times)
    queries = make_stage(config, shift=1.0).queries(batch)
    assert float(queries.rows[:, SOURCES.index("z1")].min()) >= Schedule(1.0).sigma_min
    for step in queries.then:
        assert bool(step.rows.isfinite().all()) and bool(((step.share >= 0) & (step.share <= 1)).all())


def test_mixflow_tells_less_noise_than_there_is():
    batch = make_batch(32)
    points = make_stage(MixFlowConfig(gamma=0.4, timestep_density="beta"), 3.0).points(batch)
    with_answers(batch, points)
    z1 = normal(3, "noise", batch.position, 0, batch.latent_shape)
    noised = points.sigma + 0.4 * uniform(3, "slowed", batch.position)[:, 0] * (1 - points.sigma)
    torch.testing.assert_close(points.states().double(), ray(noised, batch.latents, z1), rtol=0, atol=1e-6)
    torch.testing.assert_close(points.targets(), z1 - batch.latents, rtol=0, atol=1e-6)
    assert torch.equal(points.timestep, 1000 * points.sigma)
    assert bool((noised > points.sigma).all())


@pytest.mark.parametrize("density", ["logit_normal", "beta"])
def test_mixflow_with_gamma_zero_is_fine_tuning_to_the_last_bit(density):
    batch = make_batch(32)
    mixflow = make_stage(MixFlowConfig(gamma=0.0, timestep_density=density, condition_dropout=0.2), 3.0)
    sft = make_stage(SftConfig(timestep_density=density, condition_dropout=0.2), 3.0)
    assert mixflow.queries(batch) is None
    assert_same_points(mixflow.points(batch), sft.points(batch))
    assert mixflow.kinds == sft.kinds


def test_a_model_that_is_told_its_scale_is_told_one():
    assert replace(VARIED, guidance_scale=3.5).asking(True).guidance_scale == 1.0
    assert VARIED.asking(False) == VARIED
    with pytest.raises(ValueError, match=r"stage.guidance_scale is \{.*told one scale"):
        VARIED.asking(True)
