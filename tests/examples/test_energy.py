import math

import numpy as np
import pytest

from soar_mega.examples.digits.benchmark import benchmark_prompts, real_canvases
from soar_mega.examples.digits.energy import energy_distance, energy_to_real


def mean_distance(mu, variance):
    """E|N(mu, variance)|: the mean of a folded normal."""
    sd = math.sqrt(variance)
    tail = mu * math.erf(mu / (sd * math.sqrt(2)))
    return sd * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * variance)) + tail


@pytest.mark.parametrize(("mu", "sd"), [(0.0, 1.0), (0.7, 1.0), (0.0, 2.0), (1.5, 0.5)])
def test_gaussians_of_known_energy_distance(mu, sd):
    truth = 2 * mean_distance(mu, 1 + sd**2) - mean_distance(0, 2) - mean_distance(0, 2 * sd**2)
    rng = np.random.default_rng(0)
    estimates = [
        energy_distance(rng.standard_normal((60, 1)), mu + sd * rng.standard_normal((90, 1)))
        for _ in range(400)
    ]
    values = np.array([e.value for e in estimates])
    spread = values.std(ddof=1)
    # Unbiased: the mean of 400 estimates is within 3.5 of its standard errors.
    assert abs(values.mean() - truth) < 3.5 * spread / math.sqrt(len(values))
    # The stated standard error is the real spread (at equal distributions the jackknife is known to be too large).
    stated = math.sqrt(np.mean([e.standard_error**2 for e in estimates]))
    assert 0.85 < stated / spread < (1.2 if truth > 0 else 2.0)


def test_jackknife_equals_leaving_each_sample_out():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((6, 3)), rng.standard_normal((8, 3)) + 0.5
    variance = 0.0
    for left_out in (
        [energy_distance(np.delete(x, i, 0), y).value for i in range(6)],
        [energy_distance(x, np.delete(y, i, 0)).value for i in range(8)],
    ):
        n = len(left_out)
        variance += (n - 1) / n * np.square(left_out - np.mean(left_out)).sum()
    assert energy_distance(x, y).standard_error == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_real_canvases_are_at_distance_zero_and_noise_far_away():
    prompts = benchmark_prompts(30)
    real = energy_to_real(real_canvases(prompts), per_category=30)
    assert abs(real.value) < 4 * real.standard_error
    # One colour missing is a difference the features must see.
    grey = real_canvases(prompts).mean(axis=1, keepdims=True).repeat(3, axis=1)
    assert energy_to_real(grey, per_category=30).value > 0.1
    noise = np.random.default_rng(0).random((100, 3, 16, 16))
    assert energy_to_real(noise, per_category=30).value > 0.5


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 4)), "at least 3 samples"),
        (np.zeros((5, 3)), r"got \(5, 3\) and \(5, 4\)"),
        (np.full((5, 4), np.nan), "finite features"),
    ],
)
def test_bad_input(x, words):
    with pytest.raises(ValueError, match=words):
        energy_distance(x, np.zeros((5, 4)))
