"""Differences between arms, with errors that count both the chance in training and the choice of prompts.

Training: a run's score is that of its arm, plus what its seed does to all arms alike, plus chance of its own. The size
of that chance is taken from all arms together, for two seeds of one arm say little. Prompts: bootstrap, paired. Both
squares are added. The chance of single images is in both of them, so its square is taken off once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

Scores = Mapping[str, Mapping[int, float]]  # by arm and seed


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Of a single run: its standard deviation with the degrees of freedom it is known by; both 0 where it is not."""

    deviation: float
    freedom: int


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Standard errors of a difference.

    Attributes:
        seeds: by the chance in training, with these prompts.
        prompts: by the choice of prompts, with these runs.
        images: the part that both of them count.
    """

    seeds: float
    prompts: float
    images: float

    @property
    def total(self) -> float:
        """By all of it."""
        squares = self.seeds**2, self.prompts**2
        return math.sqrt(max(*squares, sum(squares) - self.images**2))


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """An arm minus its reference, over the seeds that both have.

    Attributes:
        errors: standard errors. low, high, p: None where no arm has two seeds.
        adjusted: p after Holm's correction; None where it is not one of those that are corrected.
    """

    arm: str
    reference: str
    measure: str
    value: float
    seeds: int
    errors: "Errors"
    low: float | None
    high: float | None
    p: float | None
    adjusted: float | None = None


def pooled(scores: Scores) -> Chance:
    """The chance of one run, from what arms and seeds leave unexplained in all scores."""
    arms = [arm for arm, runs in scores.items() if len(runs) > 1]
    rows = [(i, seed, scores[arm][seed]) for i, arm in enumerate(arms) for seed in scores[arm]]
    seeds = sorted({seed for _, seed, _ in rows})
    design = np.zeros((len(rows), len(arms) + len(seeds)))
    for row, (arm, seed, _) in enumerate(rows):
        design[row, arm] = design[row, len(arms) + seeds.index(seed)] = 1.0
    if not rows:
        return Chance(deviation=0.0, freedom=0)
    values = np.array([value for _, _, value in rows])
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(rows) - int(rank)
    if freedom == 0:
        return Chance(deviation=0.0, freedom=0)
    return Chance(
        deviation=float(np.linalg.norm(values - design @ fitted) / math.sqrt(freedom)), freedom=freedom
    )


def contrast(
    scores: Scores,
    arm: str,
    reference: str,
    measure: str,
    chance: Chance,
    prompts_error: float,
    images_error: float,
    trained: int = 2,
) -> Contrast:
    """Of two arms that have seeds in common.

    Args:
        trained: 1 where the reference is no run, but weights that have no chance in training.
    """
    seeds = [seed for seed in scores[arm] if seed in scores[reference]]
    value = float(np.mean([scores[arm][seed] - scores[reference][seed] for seed in seeds]))
    seeds_error = chance.deviation * math.sqrt(trained / len(seeds))
    errors = Errors(seeds=seeds_error, prompts=prompts_error, images=images_error)
    low = high = p = None
    if chance.freedom:
        error = errors.total
        reach = error * float(student.ppf(0.975, chance.freedom))
        low, high = value - reach, value + reach
        p = 2 * float(student.sf(abs(value) / error, chance.freedom)) if error else float(value == 0)
    return Contrast(
        arm=arm,
        reference=reference,
        measure=measure,
        value=value,
        seeds=len(seeds),
        errors=errors,
        low=low,
        high=high,
        p=p,
    )


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: that any of those below a level is pure chance is no more likely than the level."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted
