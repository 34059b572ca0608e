"""Rewards by the names that a recipe has for them."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from soar_mega.evaluation import scorers as published
from soar_mega.evaluation.scorer import TOTAL, Scorer
from soar_mega.rewards.client import WorkerScorer
from soar_mega.rewards.combined import Rewards
from soar_mega.rewards.functions import scorer_of

log = logging.getLogger(__name__)

# short names of module:class; what each needs is imported when it is made
BUILT_IN = {
    "digits": "soar_mega.examples.digits.scorer:DigitsScorer",
    "jpeg_compressibility": "soar_mega.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "soar_mega.rewards.jpeg:JpegIncompressibility",
}


def make_rewards(
    weights: Mapping[str, float], weights_dir: str | Path = "", device: str | torch.device = "cpu"
) -> Rewards:
    """The rewards of a recipe, ready to score.

    Args:
        weights: by what `make_scorer` takes; one of weight 0 is only looked at.
        weights_dir, device: as `make_scorer` takes them.

    Raises:
        ValueError: one is not known, has no usable weight, or two have the same name.
        OSError: a worker is not there.
    """
    if not weights:
        raise ValueError(
            "stage.rewards is empty: give at least one reward and its weight, as in {digits: 1.0}"
        )
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"stage.rewards: the weight of {key} is {weight!r}, a number is expected")
    if not any(weights.values()):
        raise ValueError(
            f"stage.rewards: every weight of {', '.join(weights)} is 0, so nothing would be learned"
        )
    scorers = make_scorers(list(weights), weights_dir, device)
    for scorer, weight in zip(scorers, weights.values(), strict=True):
        log.info("reward %s (%s) x %g", scorer.name, scorer.version, weight)
    return Rewards(scorers, [float(weight) for weight in weights.values()])


def make_scorers(
    keys: Sequence[str], weights_dir: str | Path = "", device: str | torch.device = "cpu"
) -> list[Scorer]:
    """Scorers of different names. ValueError where two have the same; else raises what `make_scorer` does."""
    scorers: list[Scorer] = []
    for key in keys:
        scorer = make_scorer(key, weights_dir, device)
        if scorer.name in (TOTAL, *(other.name for other in scorers)):
            raise ValueError(f"{key} is called {scorer.name}, as another reward is: give one another name")
        scorers.append(scorer)
    return scorers


def make_scorer(key: str, weights_dir: str | Path = "", device: str | torch.device = "cpu") -> Scorer:
    """A scorer by what a recipe calls it.

    Args:
        key: the name of a built-in scorer, or of one of `soar_mega.evaluation.scorers`; module:class of a
            `Scorer` that takes no arguments; module:function, with #NAME where it gives several values;
            http://host:port/score#NAME, http://host:port/compute or file:PATH#NAME for a worker, which is waited for.
        weights_dir: where published scorers find their weights.
        device: on which they judge.

    Raises:
        ValueError: there is none, or its weights are not there; says which there are, or which files are missing.
        OSError: the worker is not there.
    """
    source, _, entry = BUILT_IN.get(key, key).partition("#")
    if key in published.SCORERS:
        return published.make_scorer(key, weights_dir, device)
    if source.startswith(("http://", "https://", "file:")):
        return WorkerScorer(key)
    if ":" in source:
        return scorer_of(source, entry)
    known = ", ".join([*BUILT_IN, *published.SCORERS])
    raise ValueError(
        f"there is no reward {key!r}: choose one of {known}; module:function or module:class of your own; "
        "or a worker as http://host:port/score#NAME"
    )
