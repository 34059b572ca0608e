"""Scores of a set of prompts with their errors: bootstrap over prompts, paired between models.

The score of a set is the share (or mean) over its images; where prompts have categories it is the mean of the
categories' scores, as in GenEval. Prompts are resampled with all of their images, within their category. The resamples
are a function of the set's size alone: all models see the same ones, so that what a difference has in common cancels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from soar_mega.evaluation.suite.prompt_sets import PromptSet, Task
from soar_mega.evaluation.suite.store import Values
from soar_mega.flow.noise import uniform

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles

Outcomes = NDArray[np.float64]  # [prompts, 2]: the sum of a prompt's values, and how many images it has


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score or a difference, the standard error and the 95 % interval of which come from the bootstrap."""

    value: float
    standard_error: float
    low: float
    high: float
    prompts: int


@dataclass(frozen=True, eq=False)
class Resampled:
    """A score, and what it is in every resample of the prompts: [RESAMPLES]."""

    value: float
    scores: NDArray[np.float64]
    prompts: int


def outcomes(prompt_set: PromptSet, values: Mapping[str, Values], name: str) -> Outcomes:
    """What each prompt of a set got.

    Args:
        values: by image.
        name: of the value.
    """
    rows = []
    for item in prompt_set.items:
        own = [values[Task(item, noise).name][name] for noise in range(item.noises)]
        rows.append((sum(own), len(own)))
    return np.array(rows, dtype=np.float64)


class Bootstrap:
    """Resamples of some prompts of a set.

    Args:
        categories: of each prompt.
        chosen: which prompts count; None is all.
    """

    def __init__(self, categories: Sequence[str], chosen: Sequence[bool] | None = None) -> None:
        kept = np.flatnonzero(np.ones(len(categories), bool) if chosen is None else np.array(chosen, bool))
        names = np.array(categories)
        self._parts = {}
        for number, category in enumerate(dict.fromkeys(names[kept].tolist())):
            where = kept[names[kept] == category]
            self._parts[category] = (where, _weights(len(where), number))
        self.prompts = len(kept)

    def value(self, outcomes: Outcomes, category: str | None = None) -> float:
        """The score of all prompts, or of one category's."""
        totals = (outcomes[where].sum(axis=0) for where, _ in self._chosen(category))
        return float(np.mean([total / count for total, count in totals]))

    def resampled(self, outcomes: Outcomes, category: str | None = None) -> Resampled:
        """The score with what the resamples make of it."""
        scores = []
        for where, weights in self._chosen(category):
            total, count = outcomes[where].T
            scores.append((weights @ total) / (weights @ count))
        return Resampled(
            value=self.value(outcomes, category),
            scores=np.mean(scores, axis=0),
            prompts=self.prompts if category is None else len(self._parts[category][0]),
        )

    def score(self, outcomes: Outcomes, category: str | None = None) -> Estimate:
        """Of all prompts, or of one category's."""
        return estimate(self.resampled(outcomes, category))

    def difference(self, before: Outcomes, after: Outcomes, category: str | None = None) -> Estimate:
        """after - before of two models on the same prompts."""
        return difference(self.resampled(before, category), self.resampled(after, category))

    def _chosen(self, category: str | None) -> Iterable[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Which prompts each category has, and how often each resample takes them."""
        return self._parts.values() if category is None else [self._parts[category]]


def estimate(found: Resampled) -> Estimate:
    """A score with its error."""
    low, high = np.percentile(found.scores, INTERVAL)
    return Estimate(
        value=found.value,
        standard_error=float(np.std(found.scores, ddof=1)),
        low=float(low),
        high=float(high),
        prompts=found.prompts,
    )


def difference(before: Resampled, after: Resampled) -> Estimate:
    """after - before, by the same bootstrap."""
    found = Resampled(
        value=after.value - before.value, scores=after.scores - before.scores, prompts=after.prompts
    )
    return estimate(found)


def _weights(prompts: int, number: int) -> NDArray[np.float64]:
    """How often each resample takes each of so many prompts: [RESAMPLES, prompts]."""
    drawn = uniform(0, "bootstrap", torch.arange(RESAMPLES), number, prompts)
    index = (drawn * prompts).long().clamp(max=prompts - 1)
    return (
        torch.zeros(RESAMPLES, prompts, dtype=torch.float64)
        .scatter_add_(1, index, torch.ones_like(drawn))
        .numpy()
    )


def between_runs(values: Sequence[float]) -> Estimate:
    """The mean of what several training runs of one kind got, and its standard error over the runs. At least two."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    reach = error * float(student.ppf(0.975, len(values) - 1))
    return Estimate(
        value=mean, standard_error=error, low=mean - reach, high=mean + reach, prompts=len(values)
    )
