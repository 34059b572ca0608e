"""Scores of a set of prompts with their errors: bootstrap over prompts, paired between models.

The score of a set is the share (or mean) over its images; where prompts have categories it is the mean of the
categories' scores, as in GenEval. Prompts are resampled with all of their images, within their category. The resamples
are a function of the set's size alone: all models see the same ones, so that what a difference has in common cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from soar_mega.evaluation.suite.prompts import PromptSet, Task
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

    def score(self, outcomes: Outcomes, category: str | None = None) -> Estimate:
        """Of all prompts, or of one category's."""
        return self._estimate(*self._scores(outcomes, category), category)

    def difference(self, before: Outcomes, after: Outcomes, category: str | None = None) -> Estimate:
        """after - before of two models on the same prompts."""
        value, resampled = self._scores(after, category)
        other, others = self._scores(before, category)
        return self._estimate(value - other, resampled - others, category)

    def _scores(self, outcomes: Outcomes, category: str | None) -> tuple[float, NDArray[np.float64]]:
        parts = self._parts.values() if category is None else [self._parts[category]]
        values, resampled = [], []
        for where, weights in parts:
            total, count = outcomes[where].T
            values.append(total.sum() / count.sum())
            resampled.append((weights @ total) / (weights @ count))
        return float(np.mean(values)), np.mean(resampled, axis=0)

    def _estimate(self, value: float, resampled: NDArray[np.float64], category: str | None) -> Estimate:
        low, high = np.percentile(resampled, INTERVAL)
        return Estimate(
            value=value,
            standard_error=float(np.std(resampled, ddof=1)),
            low=float(low),
            high=float(high),
            prompts=self.prompts if category is None else len(self._parts[category][0]),
        )


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
