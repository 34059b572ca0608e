"""Drift on a Gaussian model, where every Euler step is linear and the expected error has a closed form."""

import math

import pytest
import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.evaluation.drift import drift, held_out_drift
from soar_mega.models.common.conditions import Conditions

MEAN, STD = 0.7, 0.5  # of the clean latents, per element
SHIFTED_MEAN = -0.4  # of the unconditional model


def gaussian_velocity(mean: float, std: float):  # noqa: ANN201
    """E[z1 - z0 | z] for z0 ~ N(mean, std^2), z1 ~ N(0, 1): linear in z."""

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, *[1] * (z.ndim - 1)).double()
        slope, offset = line(mean, std, s)
        return slope * z.double() + offset

    return velocity


def line(mean, std, s):  # noqa: ANN001, ANN201
    """Velocity = slope z + offset at sigma s."""
    slope = (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)
    return slope, -mean - slope * (1 - s) * mean


def expected_error(sigma_a: float, sigma_b: float, steps: int, guidance: float) -> float:
    """Exact mean of (v(z_b) - (z_b - z0)/b)^2: z_b = p z0 + q z1 + r is followed through the Euler steps."""
    p, q, r = 1 - sigma_a, sigma_a, 0.0
    width = (sigma_a - sigma_b) / steps
    for i in range(steps):
        s = sigma_a - i * width
        slope_c, offset_c = line(MEAN, STD, s)
        slope_u, offset_u = line(SHIFTED_MEAN, STD, s)
        slope = slope_u + guidance * (slope_c - slope_u)
        offset = offset_u + guidance * (offset_c - offset_u)
        p, q, r = p * (1 - width * slope), q * (1 - width * slope), r - width * (slope * r + offset)
    slope, offset = line(MEAN, STD, sigma_b)
    return error_of(p, q, r, slope, offset, sigma_b)


def error_of(p: float, q: float, r: float, slope: float, offset: float, b: float) -> float:
    """E[(slope z + offset - (z - z0)/b)^2] for z = p z0 + q z1 + r."""
    k = slope - 1 / b
    from_z0, from_z1, constant = k * p + 1 / b, k * q, k * r + offset
    return (from_z0 * MEAN + constant) ** 2 + (from_z0 * STD) ** 2 + from_z1**2


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (5, 1.0), (5, 3.0)])
def test_matches_the_closed_form(steps: int, guidance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z0 = MEAN + STD * torch.randn(64, 4, 32, 32, generator=generator, dtype=torch.float64)
    z1 = torch.randn(64, 4, 32, 32, generator=generator, dtype=torch.float64)
    cond, uncond = gaussian_velocity(MEAN, STD), gaussian_velocity(SHIFTED_MEAN, STD)
    result = drift(cond, uncond, z0, z1, 0.8, 0.4, steps, guidance)
    expected = expected_error(0.8, 0.4, steps, guidance)
    slope, offset = line(MEAN, STD, 0.4)
    on_ray = error_of(0.6, 0.4, 0.0, slope, offset, 0.4)
    assert result.absolute == pytest.approx(expected, rel=0.01)  # 262144 elements: sampling error .3 %
    assert result.on_ray.mean().item() == pytest.approx(on_ray, rel=0.01)
    assert result.relative == pytest.approx(expected / on_ray, rel=0.01)
    assert result.standard_error == pytest.approx(result.error.std().item() / 8)


def test_a_perfect_sampler_on_one_point_has_no_drift() -> None:
    """With a single clean latent the velocity (z - z0)/s is exact everywhere, and Euler steps stay on the ray."""
    z0, z1 = torch.full((2, 1, 2, 2), 0.3), torch.randn(2, 1, 2, 2)
    result = drift(lambda z, s: (z - z0) / s[:, None, None, None], None, z0, z1, 1.0, 0.25, 3, 1.0)
    assert result.absolute < 1e-10 and result.on_ray.max() < 1e-10


@pytest.mark.parametrize(
    ("a", "b", "steps"), [(0.4, 0.8, 5), (0.5, 0.5, 5), (1.2, 0.5, 5), (0.5, 0.0, 5), (0.9, 0.5, 0)]
)
def test_impossible_spans_are_refused(a: float, b: float, steps: int) -> None:
    z = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="drift"):
        drift(lambda z, s: z, None, z, z, a, b, steps, 1.0)


def make_batch(positions: list[int]) -> Batch:
    position = torch.tensor(positions)
    draws = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(p)) for p in positions]
    return Batch(
        seed=3,
        position=position,
        valid=torch.ones(len(positions), dtype=torch.bool),
        latent_shape=(4, 8, 8),
        text_length=2,
        latents=MEAN + STD * torch.stack(draws),
        text=torch.ones(len(positions), 2, 3),
        pooled=torch.ones(len(positions), 3),
        empty_text=torch.zeros(2, 3),
        empty_pooled=torch.zeros(3),
    )


def test_held_out_drift_keys_its_noise_and_tells_the_branches_apart() -> None:
    def model(z: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.text.shape == (len(z), 2, 3) and conditions.pooled.shape == (len(z), 3)
        mean = MEAN if conditions.pooled.sum() else SHIFTED_MEAN
        return gaussian_velocity(mean, STD)(z, sigma)

    spans = [[0.8, 0.4], [0.6, 0.2]]
    whole = held_out_drift(model, [make_batch(list(range(64)))], spans, 5, 3.0)
    cut = held_out_drift(model, [make_batch(list(range(40))), make_batch(list(range(40, 64)))], spans, 5, 3.0)
    for one, two in zip(whole, cut, strict=True):
        assert torch.equal(one.error, two.error) and torch.equal(one.on_ray, two.on_ray)
    expected = expected_error(0.8, 0.4, 5, 3.0)
    assert whole[0].absolute == pytest.approx(expected, rel=0.05)
    assert not math.isclose(whole[0].absolute, expected_error(0.8, 0.4, 5, 1.0), rel_tol=0.2)
