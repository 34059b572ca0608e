"""Differences between two arms, and whether they stand out from the noise of the measurement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two standard errors: a difference of pure noise goes beyond them about once in twenty comparisons.
THRESHOLD = 2.0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """b - a with its standard error."""

    value: float
    standard_error: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.value) > THRESHOLD * self.standard_error

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
    return Difference(value=mean, standard_error=math.sqrt(variance / len(each)))
