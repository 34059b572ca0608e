"""The captions of an image: one or several, each with the weight by which training draws one of them."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from soar_mega.data.text_files import NO_TEXT
from soar_mega.flow import uniform
from soar_mega.user_files import is_text

WEIGHTS_KEY = "weights"  # of a row, beside its captions


@dataclass(frozen=True)
class Caption:
    """A text, and how often it is drawn in proportion to the others of its image."""

    text: str
    weight: float = 1.0


def read_captions(row: Mapping[str, Any], key: str) -> tuple[Caption, ...]:
    """What a row says under `key`: a text, or a list of texts with a list of numbers under `weights`.

    Texts of weight 0 are left out. ValueError: there is no caption, or weights that do not fit.
    """
    value = row.get(key)
    texts = value if isinstance(value, list) else [value]
    for text in texts or [None]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"has no caption ({key} is missing or empty)")
        if not is_text(text):
            raise ValueError(f"its caption {NO_TEXT}")
    weights = row.get(WEIGHTS_KEY) if isinstance(value, list) else None
    if weights is None:
        weights = [1.0] * len(texts)
    if not _are_weights(weights, len(texts)):
        raise ValueError(
            f"{WEIGHTS_KEY} is {str(weights)[:60]}: {len(texts)} numbers from 0 on, not all 0, are expected"
        )
    pairs = zip(texts, weights, strict=True)
    return tuple(Caption(text.strip(), float(weight)) for text, weight in pairs if weight > 0)


def drawn(weights: Sequence[float], seed: int, position: Tensor) -> int:
    """Which of several captions the sample at a position [1] of the training sequence has."""
    ends = list(itertools.accumulate(weights))
    draw = float(uniform(seed, "caption", position)) * ends[-1]
    return min(bisect.bisect_right(ends, draw), len(ends) - 1)


def _are_weights(weights: Any, count: int) -> bool:
    if not isinstance(weights, list) or len(weights) != count:
        return False
    numbers = [w for w in weights if isinstance(w, int | float) and not isinstance(w, bool)]
    return len(numbers) == count and all(0 <= w <= 1e9 for w in numbers) and math.fsum(numbers) > 0
