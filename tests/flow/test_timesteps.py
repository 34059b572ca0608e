import math

import pytest
import scipy.special
import scipy.stats
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from soar_mega.flow import DENSITIES, sample_time, slowed, uniform

GRID = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # quantiles of the uniform density


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_logit_normal_has_that_distribution(mean, std):
    u = sample_time("logit_normal", GRID, mean, std)
    assert u.dtype == torch.float64 and bool((u.diff() > 0).all())
    expected = scipy.special.expit(scipy.stats.norm(mean, std).ppf(GRID.numpy()))
    torch.testing.assert_close(u, torch.from_numpy(expected))


def test_uniform_is_the_identity():
    assert torch.equal(sample_time("uniform", GRID), GRID)


@pytest.mark.parametrize("scale", [1.29, 0.0, -0.8])
def test_mode_is_the_formula_of_diffusers(scale):
    drawn = torch.rand(64, generator=torch.Generator().manual_seed(0))
    theirs = compute_density_for_timestep_sampling(
        "mode", 64, mode_scale=scale, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(
        sample_time("mode", drawn, mode_scale=scale), theirs.double(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
def test_densities_agree_with_diffusers(density):
    theirs = compute_density_for_timestep_sampling(
        density,
        5000,
        logit_mean=0.4,
        logit_std=1.2,
        mode_scale=1.29,
        generator=torch.Generator().manual_seed(1),
    )
    ours = sample_time(density, uniform(0, "time", torch.arange(5000))[:, 0], 0.4, 1.2, 1.29)
    assert scipy.stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3


def test_beta_is_the_density_under_which_mixflow_meets_all_pairs_equally():
    u = sample_time("beta", GRID)
    assert bool((u.diff() > 0).all())
    assert scipy.stats.kstest(1 - u.numpy(), scipy.stats.beta(2, 1).cdf).statistic < 1e-4
    # uniform over the triangle of (time, noisier time): both lie in a square of it as often as its area says
    noisier = slowed(u, 1.0, uniform(3, "slowed", torch.arange(len(u)))[:, 0])
    inside = ((u < 0.3) & (noisier > 0.5) & (noisier < 0.9)).double().mean()
    assert float(inside) == pytest.approx(2 * 0.3 * 0.4, abs=0.01)


def test_slowed_states_lie_between_sigma_and_noise():
    sigma, draws = torch.tensor([0.0, 0.25, 1.0]).double(), torch.tensor([0.5, 1.0, 0.3]).double()
    assert slowed(sigma, 0.4, draws).tolist() == pytest.approx([0.2, 0.25 + 0.4 * 0.75, 1.0])
    assert torch.equal(slowed(sigma, 0.0, draws), sigma)


@pytest.mark.parametrize("density", DENSITIES)
def test_times_stay_in_the_unit_interval(density):
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for mode_scale in (-1.0, 2 / (math.pi - 2)):
        u = sample_time(density, torch.cat([ends, 1 - 1e-9 * GRID]), 5.0, 3.0, mode_scale)
        assert float(u.min()) >= 0 and float(u.max()) <= 1


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="logit_normal, uniform, mode"):
        sample_time("cosine", GRID)
    with pytest.raises(ValueError, match="logit_std"):
        sample_time("logit_normal", GRID, logit_std=0.0)
    with pytest.raises(ValueError, match="mode_scale"):
        sample_time("mode", GRID, mode_scale=2.0)
    with pytest.raises(ValueError, match="mode_scale"):
        sample_time("mode", GRID, mode_scale=-1.5)
