"""What every run got, from the files of `soar-mega evaluate --suite`: its score by measure, and each prompt's share."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sweeping.plan import BEST, Measure

from soar_mega.evaluation.suite.score_errors import Bootstrap, Outcomes

CHOOSING, REPORTING = 0, 1  # halves of the prompts


@dataclass(kw_only=True)
class Prompts:
    """The prompts of one set, in the order of all outcomes."""

    texts: dict[str, int]
    categories: list[str]
    halves: list[int]


class Evaluated:
    """All outcomes of some evaluations of one suite, and the drift of their models.

    Args:
        folders: each with outcomes.csv and report.json.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._drift: dict[str, Any] = {}
        self._prompts: dict[str, Prompts] = {}
        self._outcomes: dict[tuple[Any, ...], dict[int, list[float]]] = {}
        self._bootstraps: dict[tuple[str, int | None], Bootstrap] = {}
        self.steps: int | None = None  # the suite's first
        for folder in folders:
            models = json.loads((folder / "report.json").read_text())["models"]
            self._drift |= {name: model["drift"] for name, model in models.items()}
            with (folder / "outcomes.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    if row["value"] == row["scorer"]:
                        self._add(row)

    def _add(self, row: dict[str, str]) -> None:
        prompts = self._prompts.setdefault(row["set"], Prompts(texts={}, categories=[], halves=[]))
        number = prompts.texts.setdefault(row["prompt"], len(prompts.texts))
        if number == len(prompts.categories):
            prompts.categories.append(row["category"])
            prompts.halves.append(int(row["half"]))
        steps = int(row["steps"])
        self.steps = steps if self.steps is None else self.steps
        key = (row["model"], row["set"], row["scorer"], float(row["guidance_scale"]), steps)
        total = self._outcomes.setdefault(key, {}).setdefault(number, [0.0, 0.0])
        total[0] += float(row["score"])
        total[1] += 1.0

    def scales(self, measure: Measure) -> list[float]:
        """The guidance scales at which a measure's images were drawn."""
        steps = self._steps(measure)
        return sorted(
            {
                key[3]
                for key in self._outcomes
                if key[1:3] == (measure.prompts, measure.scorer) and key[4] == steps
            }
        )

    def outcomes(self, models: Sequence[str], measure: Measure, scale: float) -> Outcomes:
        """What each prompt got from all of these models together: [prompts, 2]."""
        total = np.zeros((len(self._prompts[measure.prompts].texts), 2))
        for model in models:
            key = (model, measure.prompts, measure.scorer, scale, self._steps(measure))
            if key not in self._outcomes:
                raise ValueError(
                    f"measure {measure.name}: {model} has no images of {measure.prompts} judged by {measure.scorer} at "
                    f"guidance {scale:g} and {key[4]} steps: is it in the suite?"
                )
            for number, each in self._outcomes[key].items():
                total[number] += each
        return total

    def bootstrap(self, measure: Measure) -> Bootstrap:
        """Over the prompts that a measure reports."""
        return self._bootstrap(measure.prompts, REPORTING if measure.guidance_scale == BEST else None)

    def _bootstrap(self, prompts: str, half: int | None) -> Bootstrap:
        if (prompts, half) not in self._bootstraps:
            known = self._prompts[prompts]
            chosen = None if half is None else [each == half for each in known.halves]
            self._bootstraps[prompts, half] = Bootstrap(known.categories, chosen)
        return self._bootstraps[prompts, half]

    def scale(self, models: Sequence[str], measure: Measure) -> float:
        """The measure's guidance scale; the best one of these models together, on the half that is not reported."""
        if not isinstance(measure.guidance_scale, str):
            return measure.guidance_scale
        choosing = self._bootstrap(measure.prompts, CHOOSING)
        scores = {
            scale: choosing.value(self.outcomes(models, measure, scale)) for scale in self.scales(measure)
        }
        return max(scores, key=lambda scale: scores[scale])

    def value(self, model: str, measure: Measure, scale: float) -> float:
        """What one model got."""
        if measure.drift is not None:
            return float(np.mean(self.errors(model, measure)))
        return self.bootstrap(measure).value(self.outcomes([model], measure, scale))

    def over_prompts(
        self, pairs: Sequence[tuple[str, str]], measure: Measure, scales: tuple[float, float]
    ) -> float:
        """The standard error that the choice of prompts gives the mean difference of pairs of models."""
        before, after = zip(*pairs, strict=True)
        if measure.drift is not None:
            means = [
                np.mean([self.errors(model, measure) for model in models], axis=0)
                for models in (before, after)
            ]
            return float(np.std(means[1] - means[0], ddof=1) / len(means[0]) ** 0.5)
        first, second = (
            self.outcomes(models, measure, scale)
            for models, scale in zip((before, after), scales, strict=True)
        )
        return self.bootstrap(measure).difference(first, second).standard_error

    def errors(self, model: str, measure: Measure) -> list[float]:
        """The drift of each held-out sample."""
        found = self._drift[model]
        scale = f"{measure.guidance_scale:g}"
        for span in (found or {}).get("scales", {}).get(scale, []):
            if (span["from"], span["to"]) == measure.drift:
                return span["errors"]
        raise ValueError(
            f"measure {measure.name}: {model} has no drift over {measure.drift} at guidance {scale}"
        )

    def _steps(self, measure: Measure) -> int:
        steps = self.steps if measure.steps is None else measure.steps
        assert steps is not None
        return steps
