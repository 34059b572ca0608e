"""Stochastic steps of samplers: their mean and noise, their log-probability, and samples with steps of their own."""

import math

import pytest
import torch

from soar_mega.flow import (
    STOCHASTIC_VARIANTS,
    Schedule,
    mixed_coefficients,
    normal,
    rollout_coefficients,
    sample,
    sample_steps,
    step_log_probability,
    stochastic_step,
)

SHAPE = (2, 3, 4)


def velocity(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    s = sigma.to(z)[:, None, None, None]
    return 0.7 * z + s * s - 0.4 * z * s


def noise_at(position: torch.Tensor):
    return lambda step, samples: normal(1, "step", position[samples], step, SHAPE)


def test_the_two_grids_are_the_published_ones():
    schedule = Schedule(3.0)
    diffusers, linear = schedule.inference_sigmas(10), schedule.linear_sigmas(10)
    torch.testing.assert_close(
        diffusers[[0, 1, 2, 7, 8, 9, 10]],
        torch.tensor([1, 0.9601, 0.9133, 0.4649, 0.278, 0.0089, 0], dtype=torch.float64),
        rtol=0,
        atol=6e-5,
    )
    torch.testing.assert_close(
        linear[[0, 1, 2, 8, 9, 10]],
        torch.tensor([1, 0.9643, 0.9231, 0.4286, 0.25, 0], dtype=torch.float64),
        rtol=0,
        atol=6e-5,
    )
    with pytest.raises(ValueError, match="at least 1"):
        schedule.linear_sigmas(0)


@pytest.mark.parametrize("variant", STOCHASTIC_VARIANTS)
@pytest.mark.parametrize("grid", ["inference_sigmas", "linear_sigmas"])
def test_noise_of_many_samples_has_the_moments_of_the_step(variant, grid):
    sigmas = getattr(Schedule(3.0), grid)(10)
    start = normal(0, "start", torch.arange(1), 0, SHAPE).expand(4000, *SHAPE)
    stochastic = torch.ones(4000, 10, dtype=torch.bool)
    steps = sample_steps(velocity, start, sigmas, variant, 0.7, stochastic, noise_at(torch.arange(4000)))
    first = next(steps)
    # from sigma 1, where the second sigma stands in for it
    a, b, c = (float(x) for x in rollout_coefficients(variant, 1.0, sigmas[1], 0.7, float(sigmas[1])))
    ones = torch.ones(len(start), dtype=torch.float64)
    expected = a * start[0].double() + b * velocity(start, ones)[0].double()
    assert (first.following.double().mean(0) - expected).abs().max() < 4.5 * c / math.sqrt(4000)
    assert (first.following.double().std(0) / c - 1).abs().max() < 0.06


@pytest.mark.parametrize(("variant", "eta"), [("flow_sde", 0.7), ("dance", 0.5)])
def test_many_small_steps_of_an_sde_end_in_the_data(variant, eta):
    """For data N(1.5, .4^2) and its exact velocity; cps has no such limit, as its noise does not shrink with steps."""

    def exact(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma.to(z)[:, None]
        variance = (1 - s) ** 2 * 0.16 + s**2
        return (s - (1 - s) * 0.16) / variance * (z - (1 - s) * 1.5) - 1.5

    count, steps = 20000, 60
    z = normal(2, "start", torch.arange(count), 0, (1,))
    stochastic = torch.ones(count, steps, dtype=torch.bool)
    sigmas = Schedule(1.0).linear_sigmas(steps)

    def draw(step: int, samples: torch.Tensor) -> torch.Tensor:
        return normal(2, "step", samples, step, (1,))

    for step in sample_steps(exact, z, sigmas, variant, eta, stochastic, draw):
        z = step.following
    assert abs(z.mean() - 1.5) < 0.015 and abs(z.std() - 0.4) < 0.02


def test_log_probability_is_the_mean_of_the_gaussian_density_or_the_squares_of_cps():
    mean, following = (normal(i, "state", torch.arange(3), 0, SHAPE).double() for i in (0, 1))
    std = torch.tensor([0.3, 1.2, 0.0], dtype=torch.float64)
    density = torch.distributions.Normal(mean[:2], std[:2, None, None, None]).log_prob(following[:2])
    for variant in ("flow_sde", "dance"):
        found = step_log_probability(variant, std, following, mean)
        torch.testing.assert_close(found[:2], density.flatten(1).mean(dim=1))
        assert bool(found[2].isnan())
    found = step_log_probability("cps", std, following, mean)
    torch.testing.assert_close(found[:2], -(following - mean)[:2].square().flatten(1).mean(dim=1))
    assert bool(found[2].isnan())


@pytest.mark.parametrize("variant", STOCHASTIC_VARIANTS)
def test_samples_with_steps_of_their_own_are_as_if_drawn_alone(variant):
    sigmas, position = Schedule(3.0).inference_sigmas(6), torch.arange(3)
    stochastic = torch.zeros(3, 6, dtype=torch.bool)
    stochastic[0, 1:3], stochastic[1, 3:5] = True, True  # and the last one is deterministic
    start = normal(0, "start", position, 0, SHAPE)
    asked = []

    def noise(step: int, samples: torch.Tensor) -> torch.Tensor:
        asked.append((step, samples.tolist()))
        return noise_at(position)(step, samples)

    together = list(sample_steps(velocity, start, sigmas, variant, 0.8, stochastic, noise))
    assert asked == [(1, [0]), (2, [0]), (3, [1]), (4, [1])]
    for i in range(3):
        one = slice(i, i + 1)
        alone = sample_steps(
            velocity, start[one], sigmas, variant, 0.8, stochastic[one], noise_at(position[one])
        )
        for both, mine in zip(together, alone, strict=True):
            assert both.step == mine.step and torch.equal(both.following[one], mine.following)
            assert torch.equal(both.state[one], mine.state)
            assert torch.equal(both.log_probability[one].isnan(), ~stochastic[one, both.step])
            assert torch.equal(both.log_probability[one].nan_to_num(), mine.log_probability.nan_to_num())
    torch.testing.assert_close(
        together[-1].following[2:], sample(velocity, start[2:], sigmas), rtol=1e-6, atol=1e-6
    )


def test_a_step_of_cps_to_sigma_zero_has_no_noise():
    sigmas = Schedule(3.0).inference_sigmas(4)
    coefficients = mixed_coefficients("cps", sigmas[3], sigmas[4], 0.8, torch.ones(2, dtype=torch.bool))
    z = normal(0, "start", torch.arange(2), 0, SHAPE)
    following, log_probability = stochastic_step("cps", coefficients, z, z, None)
    assert bool(log_probability.isnan().all())
    torch.testing.assert_close(following, z - float(sigmas[3]) * z)


def test_models_are_told_what_the_caller_says():
    sigmas, told, seen = Schedule(3.0).inference_sigmas(4), torch.tensor([1.0, 0.5, 0.25, 0.125]), []

    def listening(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(float(sigma[0]))
        return 0 * z

    z = torch.zeros(1, *SHAPE)
    sample(listening, z, sigmas, "euler", told)
    sample(listening, z, sigmas, "dpm++2m", told)
    stochastic = torch.zeros(1, 4, dtype=torch.bool)
    list(sample_steps(listening, z, sigmas, "cps", 0.5, stochastic, noise_at(torch.arange(1)), told))
    assert seen == 3 * told.tolist()
