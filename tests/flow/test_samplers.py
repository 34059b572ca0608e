import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from soar_mega.flow import Schedule, guided, sample

MEAN, SPREAD = 1.5, 0.4  # data N(MEAN, SPREAD^2)


def gaussian_velocity(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[z1 - z0 | z] for Gaussian data, z [B, 3] and sigma [B]."""
    s = sigma[:, None]
    assert sigma.shape == (len(z),) and sigma.dtype == torch.float64
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return (s - (1 - s) * SPREAD**2) / variance * (z - (1 - s) * MEAN) - MEAN


def exact(z: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """The flow of Gaussian data is affine: it keeps a state's number of standard deviations."""

    def moments(s: float) -> tuple[float, float]:
        return (1 - s) * MEAN, math.sqrt((1 - s) ** 2 * SPREAD**2 + s**2)

    (m0, d0), (m1, d1) = moments(start), moments(end)
    return m1 + d1 * (z - m0) / d0


@pytest.mark.parametrize(
    ("solver", "order", "end"),
    # the last steps to sigma 0 are never small in lambda
    [("euler", 1, 0.0), ("euler", 1, 0.1), ("heun", 2, 0.0), ("heun", 2, 0.1), ("dpm++2m", 2, 0.1)],
)
def test_order_of_convergence(solver, order, end):
    z = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)
    errors = []
    for steps in (40, 80, 160):
        sigmas = torch.linspace(1, end, steps + 1, dtype=torch.float64)
        errors.append(float((sample(gaussian_velocity, z, sigmas, solver) - exact(z, 1, end)).abs().max()))
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert 2 ** (order - 0.25) < coarse / fine < 2 ** (order + 0.35)
    assert errors[-1] < (0.05 if order == 1 else 1e-3)


def test_euler_takes_the_steps_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    start = z = torch.linspace(-2, 2, 6).view(2, 3)
    for i, t in enumerate(scheduler.timesteps):
        velocity = gaussian_velocity(z, scheduler.sigmas[i].double().expand(2)).float()
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
    ours = sample(gaussian_velocity, start, Schedule(3.0).inference_sigmas(7))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_dpm_takes_the_steps_of_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    start = z = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(gaussian_velocity(z, sigmas[i].expand(2)), t, z, return_dict=False)[0]
    ours = sample(gaussian_velocity, start, sigmas, "dpm++2m")
    assert z.dtype == ours.dtype == torch.float64
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-5)


def test_heun_never_asks_for_sigma_zero():
    asked: list[float] = []

    def velocity(z, sigma):
        asked.append(float(sigma[0]))
        return -z

    sample(velocity, torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0]), "heun")
    assert asked == [1.0, 0.5, 0.5]


def test_guidance_extrapolates_and_scale_one_asks_only_once():
    z, sigma = torch.ones(2, 3), torch.ones(2, dtype=torch.float64)
    three, two = (lambda z, s: 3 * z), (lambda z, s: 2 * z)
    assert torch.equal(guided(three, two, 4.0)(z, sigma), 6 * z)
    assert torch.equal(guided(three, two, 0.0)(z, sigma), 2 * z)
    assert torch.equal(guided(three, None, 1.0)(z, sigma), 3 * z)

    def never(z, s):
        raise AssertionError("the unconditional velocity was asked for")

    assert torch.equal(guided(three, never, 1)(z, sigma), 3 * z)


def test_guidance_of_bf16_velocities_is_combined_in_the_dtype_of_the_latents():
    z, sigma = torch.linspace(-1, 1, 12).view(4, 3), torch.ones(4, dtype=torch.float64)
    cond, uncond = (lambda z, s: (3 * z).bfloat16()), (lambda z, s: (2.5 * z).bfloat16())
    v_cond, v_uncond = cond(z, sigma).float(), uncond(z, sigma).float()
    ours = guided(cond, uncond, 4.5)(z, sigma)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, 4.5 * v_cond - 3.5 * v_uncond, rtol=1e-6, atol=1e-6)


def test_bad_values_are_named():
    z = torch.ones(1, 1)
    with pytest.raises(ValueError, match="euler, heun, dpm"):
        sample(gaussian_velocity, z, torch.ones(2), "rk4")
    with pytest.raises(ValueError, match="sigmas"):
        sample(gaussian_velocity, z, torch.ones(1))
    with pytest.raises(ValueError, match="velocity_uncond"):
        guided(gaussian_velocity, None, 2.0)
