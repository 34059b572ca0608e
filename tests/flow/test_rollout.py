import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.flow import ROLLOUT_VARIANTS, rollout_coefficients

STOCHASTIC = ROLLOUT_VARIANTS[1:]


def step(variant: str, z: float, v: float, eps: float, s0: float, s1: float, eta: float, top: float) -> float:
    """One step on numbers, as each method's own code takes it; `top` replaces a sigma of 1 in flow_sde."""
    x0, x1 = z - s0 * v, z + (1 - s0) * v
    if variant == "ode":
        return z + (s1 - s0) * v
    if variant == "simple":
        return z + (s1 - s0) * v + eta * math.sqrt(abs(s1 - s0)) * eps
    if variant == "sde":
        return (1 - s1) * x0 + s1 * eps
    if variant == "dance":  # step by step as its authors' code
        dt = s1 - s0
        score = -(z - x0 * (1 - s0)) / s0**2
        return z + dt * v - 0.5 * eta**2 * score * dt + eta * math.sqrt(-dt) * eps
    if variant == "flow_sde":
        dt = s1 - s0
        std = math.sqrt(s0 / (1 - (top if s0 == 1 else s0))) * eta
        mean = z * (1 + std**2 / (2 * s0) * dt) + v * (1 + std**2 * (1 - s0) / (2 * s0)) * dt
        return mean + std * math.sqrt(-dt) * eps
    std = s1 * math.sin(eta * math.pi / 2)
    return (1 - s1) * x0 + math.sqrt(max(s1**2 - std**2, 0)) * x1 + std * eps


@pytest.mark.parametrize("variant", ROLLOUT_VARIANTS)
@given(data=st.data())
@settings(deadline=None)
def test_coefficients_equal_the_step_itself(variant, data):
    s0 = data.draw(st.one_of(st.floats(0.002, 0.999), st.just(1.0)))
    s1 = data.draw(st.floats(0.001, s0 * 0.999))
    eta = data.draw(st.floats(0, 1))
    top = data.draw(st.one_of(st.none(), st.floats(0.5, 0.99)))
    z, v, eps = (data.draw(st.floats(-3, 3)) for _ in range(3))
    a, b, c = rollout_coefficients(variant, s0, s1, eta, sigma_max=top)
    assert a.dtype == b.dtype == c.dtype == torch.float64 and a.shape == ()
    expected = step(variant, z, v, eps, s0, s1, eta, s1 if top is None else top)
    scale = abs(float(a) * z) + abs(float(b) * v) + abs(float(c) * eps) + 1e-3
    # cps near eta 1 takes sine and cosine of nearly a right angle
    assert abs(float(a * z + b * v + c * eps) - expected) < 1e-11 * max(scale, 1)


@pytest.mark.parametrize("variant", ROLLOUT_VARIANTS)
def test_a_batch_is_its_samples(variant):
    s0 = torch.tensor([1.0, 0.5, 0.5, 0.003], dtype=torch.float64)
    s1 = torch.tensor([0.97, 0.4, 0.5, 0.001], dtype=torch.float64)
    whole = torch.stack(rollout_coefficients(variant, s0, s1, 0.5))
    alone = [torch.stack(rollout_coefficients(variant, x, y, 0.5)) for x, y in zip(s0, s1, strict=True)]
    assert torch.equal(whole, torch.stack(alone, dim=-1))


@pytest.mark.parametrize("variant", ROLLOUT_VARIANTS)
@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_a_step_of_length_zero_stays(variant, sigma):
    assert [float(x) for x in rollout_coefficients(variant, sigma, sigma, 0.5)] == [1, 0, 0]


@pytest.mark.parametrize("variant", ["simple", "flow_sde", "dance", "cps"])
def test_without_noise_the_step_is_the_ode(variant):
    ours = torch.stack(rollout_coefficients(variant, 0.8, 0.7, 0.0))
    torch.testing.assert_close(
        ours, torch.stack(rollout_coefficients("ode", 0.8, 0.7, 0.0)), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("variant", ["sde", "cps"])
@pytest.mark.parametrize(("s0", "s1"), [(1.0, 0.9), (0.6, 0.2)])
def test_true_velocity_leads_to_the_marginal_of_the_ray(variant, s0, s1):
    """With v = z1 - z0 the end is (1 - s1) z0 plus noise of variance s1^2, z1 and eps being independent."""
    a, b, c = rollout_coefficients(variant, s0, s1, 0.5)
    on_z0, on_z1 = a * (1 - s0) - b, a * s0 + b
    torch.testing.assert_close(on_z0, torch.tensor(1 - s1, dtype=torch.float64))
    torch.testing.assert_close(on_z1**2 + c**2, torch.tensor(s1**2, dtype=torch.float64))


def marginal_error(variant: str, steps: int, eta: float) -> tuple[float, float]:
    """Errors of mean and variance after steps from sigma .9 to .3 for data N(2, .5^2), exact v."""
    mean0, var0 = 2.0, 0.25
    sigmas = torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64).tolist()
    mean, var = 0.1 * mean0, 0.01 * var0 + 0.81
    for s0, s1 in zip(sigmas[:-1], sigmas[1:], strict=True):
        a, b, c = (float(x) for x in rollout_coefficients(variant, s0, s1, eta))
        # E[z1 - z0 | z] of a Gaussian is linear in z.
        gain = (s0 - (1 - s0) * var0) / ((1 - s0) ** 2 * var0 + s0**2)
        offset = -mean0 - gain * (1 - s0) * mean0
        mean, var = (a + b * gain) * mean + b * offset, (a + b * gain) ** 2 * var + c**2
    return abs(mean - 0.7 * mean0), abs(var - (0.49 * var0 + 0.09))


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("variant", ["flow_sde", "dance"])
def test_the_sde_keeps_the_marginals_of_the_flow(variant, eta):
    coarse, fine = marginal_error(variant, 100, eta), marginal_error(variant, 200, eta)
    assert max(coarse[0], fine[0]) < 1e-12
    # first order in the step, so zero in the limit
    assert coarse[1] < 2e-3 and 1.8 < coarse[1] / fine[1] < 2.2


def test_bad_values_are_named():
    for arguments, text in [
        (("euler", 0.8, 0.7, 0.5), "ode, simple, sde, flow_sde, dance, cps"),
        (("ode", 0.7, 0.8, 0.5), "sigma1 <= sigma0"),
        (("ode", torch.tensor([0.8, 0.7]), torch.tensor([0.7, 0.8]), 0.5), "for every sample"),
        (("ode", 1.1, 0.8, 0.5), "sigma0 <= 1"),
        (("ode", float("nan"), 0.8, 0.5), "sigma0 <= 1"),
        (("simple", 0.8, 0.7, -0.1), "eta"),
        (("simple", 0.8, 0.7, math.inf), "eta"),
        (("cps", 0.8, 0.7, 1.5), "eta"),
        (("flow_sde", 1.0, 0.7, 0.5, 0.0), "sigma_max"),
        (("flow_sde", 1.0, 0.7, 0.5, 1.0), "sigma_max"),
    ]:
        with pytest.raises(ValueError, match=text):
            rollout_coefficients(*arguments)
