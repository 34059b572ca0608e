"""Rewards by the names that a recipe has for them."""

import logging
import math
from collections.abc import Callable, Mapping

from soar_mega.evaluation.scorer import Scorer
from soar_mega.rewards.combined import TOTAL, Rewards
from soar_mega.rewards.digits import DigitsScorer
from soar_mega.rewards.functions import FunctionScorer
from soar_mega.rewards.jpeg import JpegCompressibility, JpegIncompressibility

log = logging.getLogger(__name__)

BUILT_IN: dict[str, Callable[[], Scorer]] = {
    "digits": DigitsScorer,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
}


def make_rewards(weights: Mapping[str, float]) -> Rewards:
    """The rewards of a recipe, ready to score.

    Args:
        weights: by what `make_scorer` takes.

    Raises:
        ValueError: one is not known, has no usable weight, or two have the same name.
    """
    if not weights:
        raise ValueError(
            "stage.rewards is empty: give at least one reward and its weight, as in {digits: 1.0}"
        )
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"stage.rewards: the weight of {key} is {weight!r}, a number is expected")
    scorers: list[Scorer] = []
    for key in weights:
        scorer = make_scorer(key)
        if scorer.name in (TOTAL, *(other.name for other in scorers)):
            raise ValueError(
                f"stage.rewards: {key} is called {scorer.name}, which is taken: give it another name"
            )
        scorers.append(scorer)
        log.info("reward %s (%s) x %g", scorer.name, scorer.version, weights[key])
    return Rewards(scorers, [float(weight) for weight in weights.values()])


def make_scorer(key: str) -> Scorer:
    """A scorer by what a recipe calls it.

    Args:
        key: the name of a built-in scorer; module:function, with #NAME where the function gives several values.

    Raises:
        ValueError: there is none; says which there are.
    """
    source, _, entry = key.partition("#")
    if key in BUILT_IN:
        return BUILT_IN[key]()
    if ":" in source:
        return FunctionScorer(source, entry)
    raise ValueError(
        f"there is no reward {key!r}: choose one of {', '.join(BUILT_IN)}, or module:function of your own"
    )
