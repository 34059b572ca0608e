"""The energy distance between two sets of features: 0 for equal distributions, positive for any others.

    E = 2 E|X - Y| - E|X - X'| - E|Y - Y'|        (Szekely and Rizzo 2013), Euclidean norms, independent copies X', Y'

The estimate is the unbiased one (no pair of a sample with itself), so it may be slightly negative; its standard error
is the delete-one jackknife over both sets.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from soar_mega.examples.digits.benchmark import benchmark_prompts, real_canvases
from soar_mega.examples.digits.verifier import Verifier


@dataclass(frozen=True, kw_only=True)
class EnergyDistance:
    value: float
    standard_error: float


def energy_distance(x: ArrayLike, y: ArrayLike) -> EnergyDistance:
    """Between samples x [N, D] and y [M, D], N and M at least 3. ValueError for other shapes or values not finite."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            f"the energy distance takes two sets [N, D] and [M, D] of at least 3 samples, got {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the energy distance needs finite features; some are NaN or infinite")
    across = cdist(x, y)
    within_x, within_y = cdist(x, x).sum(axis=1), cdist(y, y).sum(axis=1)
    n, m = across.shape
    value = 2 * across.mean() - within_x.sum() / (n * (n - 1)) - within_y.sum() / (m * (m - 1))
    variance = _jackknife(across.sum(axis=1), m, within_x, within_y.sum() / (m * (m - 1)))
    variance += _jackknife(across.sum(axis=0), n, within_y, within_x.sum() / (n * (n - 1)))
    return EnergyDistance(value=float(value), standard_error=float(np.sqrt(variance)))


def _jackknife(
    across: NDArray[np.float64], others: int, within: NDArray[np.float64], other_within: float
) -> float:
    # Row sums of the distances are all that leaving one sample out changes: O(n) values of the estimate.
    n = len(within)
    without = 2 * (across.sum() - across) / ((n - 1) * others)
    without -= (within.sum() - 2 * within) / ((n - 1) * (n - 2)) + other_within
    return float((n - 1) / n * np.square(without - without.mean()).sum())


def energy_to_real(
    images: ArrayLike, verifier: Verifier | None = None, per_category: int = 60
) -> EnergyDistance:
    """Distance of the verifier's features between images generated for benchmark prompts, [N, 3, 16, 16] in [0, 1], and
    canvases drawn from held-out scans for other prompts of the same categories (so the two sets are independent)."""
    verifier = verifier or Verifier.fit()
    real = real_canvases(benchmark_prompts(per_category, seed=1), seed=1)
    return energy_distance(verifier.features(images), verifier.features(real))
