import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.flow import (
    ROLLOUT_VARIANTS,
    SOURCES,
    Schedule,
    auxiliary_rows,
    base_rows,
    combine,
    correction_strength,
    normal,
    rollout_coefficients,
)

SHAPE = (2, 3, 4)


def sources(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Six unrelated tensors [count, 2, 3, 4]."""
    return [normal(0, name, torch.arange(count), 0, SHAPE).to(dtype) for name in SOURCES]


def column(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None, None]


def draws(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sigmas (s0, s1, s') [count] of rollouts of every length over the whole range, both ends included."""
    x = torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma0 = 0.001 ** (1 - x[:, 0])  # log-uniform in [.001, 1]
    sigma1 = torch.maximum(sigma0 * x[:, 1], torch.tensor(0.001))
    sigma_aux = sigma1 + (1 - sigma1) * x[:, 2] ** 4
    sigma0[0], sigma1[0], sigma_aux[0] = 0.001, 0.001, 0.001
    sigma0[1], sigma1[1], sigma_aux[1] = 1.0, 0.97, 1.0
    return sigma0, sigma1, sigma_aux


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("variant", ROLLOUT_VARIANTS)
def test_rows_follow_the_procedure_step_by_step(variant, fresh):
    """States and targets in float64 as one would compute them: guide, step, noise again, divide."""
    s0, s1, s = draws(40)
    z0, z1, v_uncond, v_cond, eps, z1_aux = x = sources(40)
    a, b, c = rollout_coefficients(variant, s0, s1, 0.5)
    state, target = auxiliary_rows(s0, s1, s, 4.5, (a, b, c), fresh_endpoint=fresh)
    assert state.shape == target.shape == (40, 6) and state.dtype == target.dtype == torch.float64

    z = (1 - column(s0)) * z0 + column(s0) * z1
    v = v_uncond + 4.5 * (v_cond - v_uncond)
    zhat = column(a) * z + column(b) * v + column(c) * eps
    alpha = column((s - s1) / (1 - s1))
    expected = (1 - alpha) * zhat + alpha * (z1_aux if fresh else z1)
    torch.testing.assert_close(combine(state, x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(combine(target, x), (expected - z0) / column(s), rtol=0, atol=1e-10)


def test_the_target_leads_to_z0():
    s0, s1, s = draws(40)
    x = sources(40)
    state, target = auxiliary_rows(s0, s1, s, 4.5, rollout_coefficients("cps", s0, s1, 0.5))
    torch.testing.assert_close(combine(state, x) - column(s) * combine(target, x), x[0], rtol=0, atol=1e-13)


def test_base_points_lie_on_the_ray_and_aim_at_its_direction():
    s, x = draws(40)[2], sources(40)
    state, target = base_rows(s)
    torch.testing.assert_close(combine(state, x), (1 - column(s)) * x[0] + column(s) * x[1])
    assert torch.equal(combine(target, x), x[1] - x[0])


def test_the_correction_is_minus_k_times_the_error_of_the_model():
    s0, s1, s = draws(40)
    x = sources(40)
    _, target = auxiliary_rows(s0, s1, s, 4.5, rollout_coefficients("ode", s0, s1, 0.0))
    truth = x[1] - x[0]
    guided = x[2] + 4.5 * (x[3] - x[2])
    k = column(correction_strength(s0, s1, s))
    torch.testing.assert_close(combine(target, x) - truth, -k * (guided - truth), rtol=0, atol=1e-10)
    by_hand = (1 - 0.8) / (1 - 0.4) * (0.5 - 0.4) / 0.8
    assert math.isclose(
        float(correction_strength(*torch.tensor([0.5, 0.4, 0.8], dtype=torch.float64))), by_hand
    )


def test_a_perfect_model_gives_points_on_the_ray():
    s0, s1, s = draws(40)
    z0, z1, _, _, _, _ = sources(40)
    state, target = auxiliary_rows(s0, s1, s, 4.5, rollout_coefficients("ode", s0, s1, 0.0))
    x = [z0, z1, z1 - z0, z1 - z0, None, None]
    torch.testing.assert_close(combine(state, x), combine(base_rows(s)[0], x), rtol=0, atol=1e-12)
    torch.testing.assert_close(combine(target, x), z1 - z0, rtol=0, atol=1e-10)


def test_quantiles_of_k_under_the_published_sampling():
    schedule = Schedule(3.0)
    generator = torch.Generator().manual_seed(0)
    u0 = torch.sigmoid(torch.randn(100_000, dtype=torch.float64, generator=generator))
    s0, s1 = schedule.sigma(u0), schedule.rollout_end(u0, 1 / 40)
    s = s1 + (1 - s1) * torch.rand(100_000, dtype=torch.float64, generator=generator)
    q = torch.tensor([0.05, 0.5, 0.95, 0.99], dtype=torch.float64)
    quantiles = correction_strength(s0, s1, s).quantile(q)
    torch.testing.assert_close(
        quantiles, torch.tensor([0.0009, 0.0103, 0.052, 0.111]).double(), rtol=0.06, atol=0
    )


def test_a_rollout_that_stays_at_pure_noise_is_pure_noise():
    one = torch.ones(1, dtype=torch.float64)
    state, target = auxiliary_rows(one, one, one, 4.5, rollout_coefficients("ode", one, one, 0.0))
    assert state.tolist() == [[0, 1, 0, 0, 0, 0]] and target.tolist() == [[-1, 1, 0, 0, 0, 0]]
    assert correction_strength(one, one, one).tolist() == [0]


@pytest.mark.parametrize("variant", ROLLOUT_VARIANTS)
def test_float32_sources_give_float64_states_and_targets(variant):
    """Against the same sources in float64, relative to the largest sum of |c_i x_i|; answers may be bf16."""
    s0, s1, s = draws(200)
    x = sources(200, torch.float32)
    x[2:4] = [v.bfloat16() for v in x[2:4]]
    rows = [*base_rows(s), *auxiliary_rows(s0, s1, s, 4.5, rollout_coefficients(variant, s0, s1, 0.5))]
    for row in rows:
        ours = combine(row, x)
        assert ours.dtype == torch.float32
        exact = sum(column(row[:, i]) * x[i].double() for i in range(6))
        largest = sum(column(row[:, i].abs()) * x[i].double().abs() for i in range(6)).amax(dim=(1, 2, 3))
        assert float(((ours.double() - exact).abs().amax(dim=(1, 2, 3)) / largest).max()) < 1e-6


@given(st.floats(0.001, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 10))
@settings(deadline=None)
def test_target_row_is_state_row_minus_z0_over_sigma(sigma0, down, up, guidance):
    s0 = torch.tensor([sigma0], dtype=torch.float64)
    s1 = (s0 * down).clamp(min=0.001)
    s = (s1 + (1 - s1) * up).clamp(max=1)
    state, target = auxiliary_rows(s0, s1, s, guidance, rollout_coefficients("sde", s0, s1, 0.0))
    clean = torch.tensor([[1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(s[:, None] * target, state - clean, rtol=1e-12, atol=1e-14)


def test_rows_of_float32_sigmas_are_computed_in_float64():
    single = [sigma.float() for sigma in draws(40)]
    coefficients = rollout_coefficients("ode", *single[:2], 0.0)

    def made(sigmas: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = [*base_rows(sigmas[2]), *auxiliary_rows(*sigmas, 4.5, coefficients)]
        return [*rows, correction_strength(*sigmas)]

    for ours, exact in zip(made(single), made([sigma.double() for sigma in single]), strict=True):
        assert torch.equal(ours, exact)


def test_missing_sources_are_skipped_or_refused():
    state, _ = base_rows(torch.tensor([0.25]))
    z0, z1 = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert torch.equal(combine(state, [z0, z1, None, None, None, None]), torch.full((1, 1, 2, 2), 0.75))
    with pytest.raises(AssertionError, match="z1"):
        combine(state, [z0, None, None, None, None, None])


def test_extra_leading_dimensions_share_a_samples_sources():
    x = sources(2, torch.float32)
    rows = torch.rand(2, 5, 6, dtype=torch.float64)
    ours = combine(rows, [source[:, None] for source in x])
    expected = combine(rows.flatten(0, 1), [source.repeat_interleave(5, dim=0) for source in x])
    assert torch.equal(ours, expected.view(2, 5, *SHAPE))
