import math
from decimal import ROUND_FLOOR, Decimal

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from soar_mega.flow import Schedule

UNIT = st.floats(0, 1)
SHIFT = st.floats(0.2, 12)


def published_index(u: float) -> int:
    """The published look-up, with the multiple of 1/1000 decided in exact decimal arithmetic."""
    return min(int((1000 * (1 - Decimal(str(u)))).to_integral_value(ROUND_FLOOR)), 999)


@given(UNIT, SHIFT)
@settings(deadline=None)
def test_continuous_sigma_is_the_shift_formula_and_has_an_inverse(u, shift):
    schedule = Schedule(shift)
    sigma = schedule.sigma(u)
    assert sigma.dtype == torch.float64
    assert math.isclose(float(sigma), shift * u / (1 + (shift - 1) * u), rel_tol=1e-14)
    assert math.isclose(float(schedule.unshift(sigma)), u, rel_tol=1e-12, abs_tol=1e-15)
    assert float(schedule.timestep(sigma)) == 1000 * float(sigma)


@given(SHIFT)
@settings(deadline=None)
def test_the_ends_are_exact(shift):
    assert Schedule(shift).sigma(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert Schedule(shift).unshift(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_is_the_training_table_of_diffusers(shift):
    table = FlowMatchEulerDiscreteScheduler(shift=shift)
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)  # multiples of 1/1000 and points between them
    index = torch.tensor([published_index(round(x, 5)) for x in u.tolist()])
    schedule = Schedule(shift, grid=True)
    sigma = schedule.sigma(u)
    torch.testing.assert_close(sigma, table.sigmas.double()[index], rtol=2e-7, atol=0)
    torch.testing.assert_close(schedule.timestep(sigma), table.timesteps.double()[index], rtol=2e-7, atol=0)


def test_grid_floor_at_multiples_reached_by_subtraction():
    schedule = Schedule(3.0, grid=True)
    for i in range(960):  # u1 = u0 - 0.04 is again a multiple of 1/1000, which float64 misses by an ulp
        u0 = i / 1000 + 0.04
        k = max(i, 1)
        assert math.isclose(float(schedule.rollout_end(u0, 1 / 25)), 3 * k / (1000 + 2 * k), rel_tol=1e-12), i


def test_grid_timestep_of_a_sigma_between_entries_is_the_lower_one():
    schedule = Schedule(3.0, grid=True)
    low, high = schedule.sigma(0.5), schedule.sigma(0.501)
    between = torch.stack([low, low + 0.01 * (high - low), low + 0.99 * (high - low), high])
    torch.testing.assert_close(schedule.timestep(between), 1000 * torch.stack([low, low, low, high]))
    assert float(schedule.timestep(1e-4)) == 1000 * schedule.sigma_min
    assert float(schedule.timestep(1.0)) == 1000


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(("shift", "sigma_min"), [(1.0, 0.001), (3.0, 3 / 1002)])
def test_rollout_end_goes_one_step_down_and_never_below_the_floor(grid, shift, sigma_min):
    schedule = Schedule(shift, grid=grid)
    assert math.isclose(schedule.sigma_min, sigma_min, rel_tol=1e-14)
    u0 = torch.tensor([1.0, 0.5, 0.0255, 0.025, 0.01, 0.0], dtype=torch.float64)
    u1 = torch.tensor([0.975, 0.475, 0.0005, 0, 0, 0], dtype=torch.float64)
    expected = torch.clamp(shift * u1 / (1 + (shift - 1) * u1), min=sigma_min)
    torch.testing.assert_close(schedule.rollout_end(u0, 1 / 40), expected, rtol=1e-12, atol=0)
    assert float(schedule.rollout_end(1.0, 1.0)) == schedule.sigma_min


@given(UNIT, SHIFT, st.integers(1, 100), st.booleans())
@settings(deadline=None)
def test_a_rollout_never_goes_up(u0, shift, steps, grid):
    schedule = Schedule(shift, grid=grid)
    start = max(float(schedule.sigma(u0)), schedule.sigma_min)
    assert schedule.sigma_min <= float(schedule.rollout_end(u0, 1 / steps)) <= start <= 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_inference_sigmas_are_those_of_diffusers(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = Schedule(shift).inference_sigmas(steps)
    assert sigmas.dtype == torch.float64 and sigmas[-1] == 0
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=5e-7, atol=1e-7)


def test_bad_values_are_named():
    for call, text in [
        (lambda: Schedule(0.0), "shift"),
        (lambda: Schedule(1.0, num_train_timesteps=0), "num_train_timesteps"),
        (lambda: Schedule(1.0).sigma(1.1), r"\[0, 1\]"),
        (lambda: Schedule(1.0).sigma(torch.tensor([0.5, float("nan")])), r"\[0, 1\]"),
        (lambda: Schedule(1.0).rollout_end(1.5, 0.1), r"\[0, 1\]"),
        (lambda: Schedule(1.0).inference_sigmas(0), "sampling steps"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
