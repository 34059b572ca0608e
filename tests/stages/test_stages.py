"""SOAR, SFT and the control arm: states and targets against a step-by-step float64 reading of the method."""

import pytest
import torch
from point_sources import gather_sources

from soar_mega.data.batch import Batch
from soar_mega.flow import SOURCES, Schedule, normal
from soar_mega.stages import SftConfig, SftMultiConfig, SoarConfig, make_stage

SHAPE = (2, 4, 6)
Z1 = SOURCES.index("z1")  # a query lies on the ray: its coefficient of the noise is sigma


def make_batch(size: int = 8, first: int = 0) -> Batch:
    position = torch.arange(first, first + size)
    latents = normal(7, "test", position, 0, SHAPE)
    return Batch(
        seed=3,
        position=position,
        valid=torch.ones(size, dtype=torch.bool),
        latent_shape=SHAPE,
        text_length=5,
        latents=latents,
    )


def with_answers(batch: Batch, points):
    """The points with sources, their velocities any fixed tensors per sample."""
    velocity = [normal(7, name, batch.position, 0, SHAPE) for name in ("v_uncond", "v_cond")]
    points.sources = gather_sources(batch, points, *velocity)
    return [v[points.sample] for v in velocity]


def ray(sigma: torch.Tensor, z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * z0.double() + sigma * z1.double()


def test_auxiliary_points_follow_the_method_step_by_step():
    batch = make_batch()
    config = SoarConfig(num_auxiliary_points=3, sampling_steps=5, guidance_scale=3.0)
    stage = make_stage(config, shift=1.0)
    points = stage.points(batch)
    auxiliary = points.take(points.of_kind("aux").nonzero().flatten())
    v_uncond, v_cond = with_answers(batch, auxiliary)
    z0, z1 = batch.latents[auxiliary.sample], normal(3, "noise", batch.position[auxiliary.sample], 0, SHAPE)

    queries = stage.queries(batch)
    sigma0 = queries.rows[auxiliary.sample, Z1]
    floor = Schedule(1.0).sigma_min
    sigma1 = (sigma0 - 1 / 5).clamp(min=floor).minimum(sigma0)  # shift 1: sigma is unshifted time
    v = v_uncond.double() + 3.0 * (v_cond.double() - v_uncond.double())
    rolled = ray(sigma0, z0, z1) + (sigma1 - sigma0)[:, None, None, None] * v
    blend = ((auxiliary.sigma - sigma1) / (1 - sigma1))[:, None, None, None]
    state = (1 - blend) * rolled + blend * z1.double()
    target = (state - z0.double()) / auxiliary.sigma[:, None, None, None]

    torch.testing.assert_close(auxiliary.states().double(), state, rtol=0, atol=2e-6)
    worst = (auxiliary.targets().double() - target).abs().amax() / target.abs().amax()
    assert worst < 1e-6
    assert bool((auxiliary.sigma >= sigma1).all()) and bool((auxiliary.sigma <= 1).all())


def test_base_points_lie_on_the_ray():
    batch = make_batch()
    points = make_stage(SoarConfig(), 3.0).points(batch)
    base = points.take((points.of_kind("base")).nonzero().flatten())
    with_answers(batch, base)
    z1 = normal(3, "noise", batch.position, 0, SHAPE)
    torch.testing.assert_close(base.states().double(), ray(base.sigma, batch.latents, z1), rtol=0, atol=1e-6)
    torch.testing.assert_close(base.targets(), z1 - batch.latents, rtol=0, atol=1e-6)


def test_sft_is_soar_without_auxiliary_points():
    batch = make_batch()
    sft, soar = make_stage(SftConfig(), 3.0), make_stage(SoarConfig(num_auxiliary_points=0), 3.0)
    assert sft.queries(batch) is None and soar.queries(batch) is None
    left, right = sft.points(batch), soar.points(batch)
    assert len(left) == len(batch)
    for name in ("sigma", "state_rows", "target_rows", "weight", "count"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_control_arm_shares_every_draw_and_lies_on_the_ray():
    batch = make_batch()
    soar = make_stage(SoarConfig(), 3.0).points(batch)
    control_stage = make_stage(SftMultiConfig(), 3.0)
    assert control_stage.queries(batch) is None
    control = control_stage.points(batch)
    for name in ("sample", "sigma", "timestep", "weight", "count", "dropped"):
        assert torch.equal(getattr(soar, name), getattr(control, name))
    assert not torch.equal(soar.state_rows, control.state_rows)
    velocity_columns = [SOURCES.index(name) for name in ("v_uncond", "v_cond", "eps", "z1_aux")]
    assert bool((control.state_rows[:, velocity_columns] == 0).all())


def test_draws_depend_on_the_position_alone():
    stage = make_stage(SoarConfig(num_rollout_paths=2, condition_dropout=0.3), 3.0)
    whole, part = stage.points(make_batch(8)), stage.points(make_batch(3, first=5))
    for kind in ("base", "aux"):
        a = whole.take((whole.of_kind(kind) & (whole.sample >= 5)).nonzero().flatten())
        b = part.take(part.of_kind(kind).nonzero().flatten())
        for name in ("sigma", "state_rows", "target_rows", "dropped", "weight"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_samples_without_room_for_a_step_keep_only_their_ode_path():
    batch = make_batch(400)
    config = SoarConfig(
        num_auxiliary_points=2, num_rollout_paths=3, sampling_steps=4, timestep_density="uniform"
    )
    stage = make_stage(config, 1.0)
    points = stage.points(batch)
    starts_low = stage.queries(batch).rows[points.sample, Z1] <= 0.25
    stochastic = points.of_kind("aux") & (points.path > 0)
    assert bool(starts_low.any())
    assert torch.equal(points.count == 0, stochastic & starts_low)
    assert torch.equal(points.weight == 0, points.count == 0)


def test_stochastic_paths_read_their_own_noise():
    batch = make_batch()
    points = make_stage(SoarConfig(num_rollout_paths=2, fresh_endpoint=True), 3.0).points(batch)
    eps, fresh = SOURCES.index("eps"), SOURCES.index("z1_aux")
    present = points.of_kind("aux") & (points.count > 0)
    assert bool((points.state_rows[present & (points.path == 1), eps] != 0).all())
    assert bool((points.state_rows[points.path == 0, eps] == 0).all())
    assert bool((points.state_rows[present, fresh] != 0).all())


def test_unreadable_samples_count_for_nothing():
    batch = make_batch()
    batch.valid[2] = False
    points = make_stage(SoarConfig(auxiliary_weight=0.3, loss_weighting="sigma_sqrt"), 3.0).points(batch)
    assert torch.equal(points.count == 0, points.sample == 2)
    assert torch.equal(points.weight, points.count * points.sigma**-2)
    assert set(points.count[points.of_kind("aux")].tolist()) == {0.0, 0.3}


def test_a_share_of_the_samples_sees_the_empty_prompt():
    """At all of its points, and where its rollout begins."""
    batch = make_batch(1000)
    stage = make_stage(SoarConfig(condition_dropout=0.3), 3.0)
    dropped, points = stage.queries(batch).dropped, stage.points(batch)
    assert int(dropped.sum()) == pytest.approx(300, abs=60)
    assert torch.equal(points.dropped, dropped[points.sample])


def test_upper_ratio_bounds_the_auxiliary_sigmas():
    batch = make_batch(64)
    stage = make_stage(SoarConfig(sigma_upper_ratio=0.1, sampling_steps=5), 1.0)
    points = stage.points(batch)
    floor = Schedule(1.0).sigma_min
    sigma0 = stage.queries(batch).rows[points.sample, Z1]
    sigma1 = (sigma0 - 0.2).clamp(min=floor).minimum(sigma0)
    upper = sigma1 + 0.1 * (1 - sigma1)
    assert bool((points.sigma <= upper + 1e-12)[points.of_kind("aux")].all())


def test_unknown_stage_is_named():
    with pytest.raises(ValueError, match="stage.name: 'sooar'"):
        make_stage(SoarConfig(name="sooar"), 3.0)
