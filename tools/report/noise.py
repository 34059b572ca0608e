"""Differences between two arms, and whether they stand out from the noise of the measurement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

# A difference of pure noise goes beyond its threshold once in twenty comparisons.
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """b - a with its standard error, and how many of those count as noise (more for few samples)."""

    value: float
    standard_error: float
    threshold: float = 1.96

    @property
    def beyond_noise(self) -> bool:
        return abs(self.value) > self.threshold * self.standard_error

    def verdict(self) -> str:
        if not self.beyond_noise:
            return "within noise"
        if self.standard_error == 0:
            return "beyond noise"
        return f"beyond noise ({abs(self.value) / self.standard_error:.1f} standard errors)"


def difference(a: float, a_error: float, b: float, b_error: float) -> Difference:
    """Of two independent measurements. Where both saw the same prompts this overstates the error: the
    cautious side.
    """
    return Difference(value=b - a, standard_error=math.hypot(a_error, b_error))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of two arms measured on the same samples: the error is that of the mean of the differences.

    ValueError unless both have the same number of samples, at least 2.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"a paired difference needs two equally long lists of 2 values or more: {len(a)}, {len(b)}"
        )
    each = [y - x for x, y in zip(a, b, strict=True)]
    mean = sum(each) / len(each)
    variance = sum((d - mean) ** 2 for d in each) / (len(each) - 1)
    threshold = float(student.ppf((1 + CONFIDENCE) / 2, len(each) - 1))
    return Difference(value=mean, standard_error=math.sqrt(variance / len(each)), threshold=threshold)
