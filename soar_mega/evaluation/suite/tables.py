"""The numbers of a report, from the values of all images: plain values for JSON, CSV and the page."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations

import numpy as np

from soar_mega.evaluation.suite.one_model import PICTURES
from soar_mega.evaluation.suite.prompt_sets import PromptSet, Task
from soar_mega.evaluation.suite.score_errors import (
    Bootstrap,
    Estimate,
    Resampled,
    between_runs,
    difference,
    estimate,
    outcomes,
)
from soar_mega.evaluation.suite.store import DEFECTS, MARK, Images, Json, Values
from soar_mega.evaluation.suite.suite_settings import Point, Suite

CHOOSING, REPORTING = 0, 1  # halves of the prompts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that is known of one model.

    Attributes:
        values: {(point, set): {scorer: {image: values}}}
        images: {(point, set): its images}
        distances: {(point, set): {fid, kid, ...}} of the sets that name real images
        resampled: what `Tables.resampled` has found out; while a run is watched, each report has all earlier models.
    """

    name: str
    path: str
    images: Mapping[tuple[Point, str], Images]
    values: Mapping[tuple[Point, str], Mapping[str, Mapping[str, Values]]]
    distances: Mapping[tuple[Point, str], Mapping[str, float]] = field(default_factory=dict)
    history: Sequence[Json] = ()
    drift: Json | None = None
    resampled: dict[tuple[object, ...], Resampled] = field(default_factory=dict, repr=False)

    @property
    def arm(self) -> str:
        """soar of soar#1 and soar#2, runs that differ in their seed alone."""
        return self.name.partition("#")[0]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One value of one set's images."""

    prompt_set: PromptSet
    scorer: str
    value: str
    title: str


@dataclass(kw_only=True)
class Tables:
    """Everything that is reported of some models. The first model, and the suite's first point, are the table's."""

    suite: Suite
    sets: Sequence[PromptSet]
    models: Sequence[Measured]
    _bootstraps: dict[tuple[str, int | None], Bootstrap] = field(default_factory=dict)

    def columns(self) -> list[Column]:
        """What each scorer is asked for: a column of the table for each scorer of each set."""
        pairs = [(each, name) for each in self.sets for name in self._scorers(each)]
        names = [name for _, name in pairs]
        return [
            Column(
                prompt_set=each,
                scorer=name,
                value=name,
                title=name if names.count(name) == 1 else f"{each.name}: {name}",
            )
            for each, name in pairs
        ]

    def _scorers(self, prompt_set: PromptSet) -> list[str]:
        values = self.models[0].values[self.suite.points[0], prompt_set.name]
        return [name for name in values if name != PICTURES]

    def more_values(self, column: Column) -> list[str]:
        """What a scorer says beside its own value, such as why an image is wrong."""
        values = self.models[0].values[self.suite.points[0], column.prompt_set.name][column.scorer]
        return [name for name in next(iter(values.values())) if name != column.value]

    def bootstrap(self, prompt_set: PromptSet, half: int | None = None) -> Bootstrap:
        """The resamples of a set, or of one half of its prompts."""
        key = (prompt_set.name, half)
        if key not in self._bootstraps:
            items = prompt_set.items
            chosen = None if half is None else [item.half == half for item in items]
            self._bootstraps[key] = Bootstrap([item.category for item in items], chosen)
        return self._bootstraps[key]

    def resampled(
        self,
        model: Measured,
        point: Point,
        column: Column,
        value: str | None = None,
        category: str | None = None,
        half: int | None = None,
    ) -> Resampled:
        """A score with its resamples: of the column's value or another one, of all prompts, a category's or a half."""
        key = (point, column.prompt_set.name, column.scorer, value, category, half)
        if key not in model.resampled:
            values = model.values[point, column.prompt_set.name][column.scorer]
            own = outcomes(column.prompt_set, values, value or column.value)
            model.resampled[key] = self.bootstrap(column.prompt_set, half).resampled(own, category)
        return model.resampled[key]

    def score(self, model: Measured, point: Point, column: Column) -> Estimate:
        """What a model got."""
        return estimate(self.resampled(model, point, column))

    def scores(self) -> list[Json]:
        """A row for each model, point, value and category ("" is all of them)."""
        rows = []
        for model in self.models:
            for point in self.suite.points:
                for column in self.columns():
                    rows += self._scores(model, point, column)
        return rows

    def _scores(self, model: Measured, point: Point, column: Column) -> list[Json]:
        rows = []
        said = {"model": model.name, **asdict(point), "set": column.prompt_set.name, "scorer": column.scorer}
        categories = column.prompt_set.categories
        for category in ["", *categories] if len(categories) > 1 else [""]:
            found = estimate(self.resampled(model, point, column, category=category or None))
            rows.append(said | {"value": column.value, "category": category} | named(found))
        for value in self.more_values(column):
            found = estimate(self.resampled(model, point, column, value))
            rows.append(said | {"value": value, "category": ""} | named(found))
        return rows

    def differences(self) -> list[Json]:
        """Of each pair of models, at each point and of each column: the later one minus the earlier one."""
        return [
            {"model": after.name, "minus": before.name, **asdict(point), "column": column.title}
            | named(difference(self.resampled(before, point, column), self.resampled(after, point, column)))
            for before, after in combinations(self.models, 2)
            for point in self.suite.points
            for column in self.columns()
        ]

    def best_of_sweep(self) -> list[Json]:
        """Each model at the guidance scale that is its best on one half of the prompts, scored on the other half.

        Empty where there is one scale, or a set with a single prompt in a half.
        """
        steps = self.suite.steps[0]
        points = [point for point in self.suite.points if point.steps == steps]
        rows: list[Json] = []
        for column in self.columns() if len(points) > 1 else []:
            halves = [sum(item.half == half for item in column.prompt_set.items) for half in (0, 1)]
            if min(halves) < 2:
                continue
            first: Resampled | None = None
            for model in self.models:
                of_half = partial(self.resampled, model, column=column)
                choosing = {point: of_half(point=point, half=CHOOSING).value for point in points}
                best = max(points, key=choosing.__getitem__)
                found = of_half(point=best, half=REPORTING)
                row = {"model": model.name, "column": column.title, "guidance_scale": best.guidance_scale}
                row |= named(estimate(found))
                if first is not None:
                    row["minus_first"] = named(difference(first, found))
                first = first or found
                rows.append(row)
        return rows

    def arms(self) -> list[Json]:
        """The mean over runs that differ in their seed, with its error over the runs."""
        arms = {model.arm: [each for each in self.models if each.arm == model.arm] for model in self.models}
        rows = []
        for arm, runs in arms.items():
            if len(runs) < 2:
                continue
            for point in self.suite.points:
                for column in self.columns():
                    values = [self.resampled(run, point, column).value for run in runs]
                    said = {"arm": arm, **asdict(point), "column": column.title, "runs": len(runs)}
                    rows.append(
                        said | {k: v for k, v in named(between_runs(values)).items() if k != "prompts"}
                    )
        return rows

    def between_noises(self) -> list[Json]:
        """The score with each noise alone, where all prompts of a set have the same number of noises above one."""
        rows = []
        for model in self.models:
            for point in self.suite.points:
                for column in self.columns():
                    noises = {item.noises for item in column.prompt_set.items}
                    if len(noises) != 1 or noises == {1}:
                        continue
                    values = model.values[point, column.prompt_set.name][column.scorer]
                    alone = [self._one_noise(column, values, noise) for noise in range(noises.pop())]
                    error = float(np.std(alone, ddof=1) / len(alone) ** 0.5)
                    said = {"model": model.name, **asdict(point), "column": column.title}
                    rows.append(said | {"scores": alone, "standard_error": error})
        return rows

    def _one_noise(self, column: Column, values: Mapping[str, Values], noise: int) -> float:
        rows = [(values[Task(item, noise).name][column.value], 1.0) for item in column.prompt_set.items]
        return self.bootstrap(column.prompt_set).value(np.array(rows))

    def defects(self) -> list[Json]:
        """How many images are black or NaN, where there are such."""
        rows = []
        for model in self.models:
            for (point, name), scorers in model.values.items():
                for kind in DEFECTS:
                    count = sum(values[kind] for values in scorers[PICTURES].values())
                    if count:
                        said = {"model": model.name, **asdict(point), "set": name}
                        rows.append(said | {"images": int(count), "of": len(scorers[PICTURES]), "are": kind})
        return rows

    def distances(self) -> list[Json]:
        """FID and the like, of each model, point and set that has them."""
        return [
            {"model": model.name, **asdict(point), "set": name} | dict(found)
            for model in self.models
            for (point, name), found in model.distances.items()
        ]

    def report(self) -> Json:
        """All of it."""
        return {
            "suite": self.suite.name,
            "models": {
                model.name: {"path": model.path, "training": list(model.history), "drift": model.drift}
                for model in self.models
            },
            "sets": {
                each.name: {"file": str(each.path), "prompts": len(each.items), "images": len(each.tasks)}
                for each in self.sets
            },
            "published": {row: dict(values) for row, values in self.suite.published.items()},
            "scores": self.scores(),
            "differences": self.differences(),
            "best_of_sweep": self.best_of_sweep(),
            "arms": self.arms(),
            "between_noises": self.between_noises(),
            "distances": self.distances(),
            "defects": self.defects(),
        }

    def outcome_rows(self) -> list[Json]:
        """A row for each value of each image."""
        return [
            {
                "model": model.name,
                **asdict(point),
                "set": each.name,
                "scorer": scorer,
                "value": value,
                "image": task.name,
                "category": task.item.category,
                "half": task.item.half,
                "noise": task.noise,
                "score": number,
                "prompt": task.item.prompt,
            }
            for model in self.models
            for each in self.sets
            for point in self.suite.points
            for scorer, values in model.values[point, each.name].items()
            for task in each.tasks
            for value, number in values[task.name].items()
        ]


def named(estimate: Estimate) -> Json:
    """An estimate's numbers by name; its value is the score."""
    said = asdict(estimate)
    return {"score": said.pop("value")} | said


def to_csv(rows: Sequence[Json]) -> str:
    """Rows as CSV; the last column says who wrote it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "written_by"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"written_by": MARK.decode()} for row in rows)
    return text.getvalue()
