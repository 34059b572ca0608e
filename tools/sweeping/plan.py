"""What a sweep consists of, as its YAML file says it; recipes/tiny/study.yaml is one with everything."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from walk.work import forward_units

from soar_mega.config import Recipe
from soar_mega.models.family import model_sizes
from soar_mega.stages import load_recipe

BEST = "best"
BASE = "base"  # among the references of an arm, the weights that all start from
WRITTEN_BY = "tools/sweep.py"  # in all files of a sweep, so that they may be replaced


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of a run: the score of a set of prompts, or the drift of a span.

    Attributes:
        scorer: what judges the images of the prompt set `prompts`; "" where drift is measured.
        drift: (from, to) in sigma.
        guidance_scale: of sampling; BEST: the one of the sweep that is an arm's best on half of the prompts, and the
            score is that of the other half.
        steps: of sampling; None: the suite's first.
    """

    name: str
    prompts: str = ""
    scorer: str = ""
    drift: tuple[float, float] | None = None
    guidance_scale: float | str
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        references: the arms that it is compared with, and BASE.
        iterations: optimizer steps.
        units: forwards of a sample in a step; a backward is two, and a drawn sample's part of drawing it is counted.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    references: tuple[str, ...]
    seeds: tuple[int, ...]
    iterations: int
    units: float


@dataclass(frozen=True, kw_only=True)
class Canvases:
    """How much of the built-in data is made for the sweep."""

    train: int
    held_out: int
    prompts_per_category: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The whole of it.

    Attributes:
        folder: of runs, evaluation and page.
        base: the pipeline that all runs start from, which is evaluated too; "": each starts as its recipe says.
        curve: iterations before the last one at which runs are evaluated as well.
        evaluate: arguments of `soar-mega evaluate` beside the models and --out.
        primary: the measures whose contrasts are corrected for being many.
        slurm: resources of a job, as in a chain.
    """

    folder: Path
    base: str
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    primary: tuple[str, ...]
    curve: tuple[int, ...]
    evaluate: tuple[str, ...]
    canvases: Canvases | None
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


KEYS = {
    "folder",
    "base",
    "overrides",
    "seeds",
    "budget",
    "canvases",
    "evaluate",
    "curve",
    "measures",
    "primary",
    "arms",
    "slurm",
}


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep and checks that its parts fit each other.

    Raises:
        ValueError: a key, a value or a name is wrong; says which and what would be right.
    """
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    _check_keys(said, KEYS, str(path))
    for key in ("folder", "arms", "measures", "primary"):
        if not said.get(key):
            raise ValueError(f"{path}: {key} is missing")
    measures = tuple(
        _measure(name, each, f"{path}: measures.{name}") for name, each in said["measures"].items()
    )
    shared = {key: said.get(key) for key in ("overrides", "seeds", "budget")}
    if said.get("base"):
        shared["overrides"] = [f"model.pipeline_dir={said['base']}", *(shared["overrides"] or ())]
    arms = tuple(_arm(name, each, shared, f"{path}: arms.{name}") for name, each in said["arms"].items())
    for arm in arms:
        if arm.name == BASE:
            raise ValueError(
                f"{path}: arms.{BASE}: this is what the weights are called that all arms start from"
            )
        for name in arm.references:
            if name == BASE and said.get("base"):
                continue
            other = next((each for each in arms if each.name == name), None)
            if other is None or not set(other.seeds) & set(arm.seeds):
                raise ValueError(
                    f"{path}: arms.{arm.name}.references: there is no arm {name!r} with a seed of its seeds"
                )
    for name in said["primary"]:
        if name not in said["measures"]:
            raise ValueError(f"{path}: primary: there is no measure {name!r}")
    canvases = said.get("canvases")
    if canvases is not None:
        _check_keys(canvases, {"train", "held_out", "prompts_per_category"}, f"{path}: canvases")
    return Sweep(
        folder=Path(said["folder"]),
        base=said.get("base", ""),
        arms=arms,
        measures=measures,
        primary=tuple(said["primary"]),
        curve=tuple(said.get("curve", ())),
        evaluate=_words(said.get("evaluate", ()), f"{path}: evaluate"),
        canvases=Canvases(**canvases) if canvases else None,
        slurm=said.get("slurm", {}),
    )


def _measure(name: str, said: Any, where: str) -> Measure:
    _check_keys(said, {"prompts", "scorer", "drift", "guidance_scale", "steps"}, where)
    span, scale = said.get("drift"), said.get("guidance_scale")
    if (span is None) == (said.get("scorer") is None):
        raise ValueError(f"{where}: give prompts and scorer, or drift: [from, to]")
    if scale != BEST and not _is_number(scale):
        raise ValueError(f"{where}: guidance_scale: a number or {BEST} is expected, found {scale!r}")
    if span is not None and (scale == BEST or not isinstance(span, list) or len(span) != 2):
        raise ValueError(f"{where}: drift is [from, to], at a guidance_scale that is a number")
    settings = {key: value for key, value in said.items() if key not in ("drift", "guidance_scale")}
    return Measure(
        name=name,
        drift=None if span is None else (float(span[0]), float(span[1])),
        guidance_scale=scale if scale == BEST else float(scale),
        **settings,
    )


def _arm(name: str, said: Any, shared: Mapping[str, Any], where: str) -> Arm:
    _check_keys(said, {"recipe", "overrides", "references", "seeds", "budget"}, where)
    if not str(name).replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"{where}: a name of letters, digits, - and _ is expected: it names folders")
    seeds = said.get("seeds", shared["seeds"])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{where}: seeds: a list of whole numbers is expected, here or for all arms")
    words = _words(shared["overrides"] or (), "overrides") + _words(said.get("overrides", ()), where)
    recipe = load_recipe(said.get("recipe", ""), words)
    units = units_of(recipe)
    return Arm(
        name=name,
        recipe=said["recipe"],
        overrides=words,
        references=_words(said.get("references", ()), where),
        seeds=tuple(seeds),
        iterations=_iterations(said.get("budget", shared["budget"]), units, where),
        units=units,
    )


def units_of(recipe: Recipe) -> float:
    """Forwards of a sample in a step of a recipe, a backward counting as two, and its part of drawing it."""
    # a preset says enough where the pipeline is not here
    model = replace(recipe.model, pipeline_dir="") if recipe.model.preset else recipe.model
    return forward_units(recipe.stage.asking(model_sizes(model).guidance_embeds))


def _iterations(budget: Any, units: float, where: str) -> int:
    """Of a budget in steps, or in forwards of each place in a batch."""
    if not isinstance(budget, dict) or len(budget) != 1 or not budget.keys() <= {"steps", "forward_units"}:
        raise ValueError(
            f"{where}: budget: write {{steps: 200}} or {{forward_units: 2200}}, found {budget!r}"
        )
    [(kind, amount)] = budget.items()
    if not _is_number(amount) or amount <= 0:
        raise ValueError(f"{where}: budget: a number above 0 is expected, found {amount!r}")
    return max(1, round(amount if kind == "steps" else amount / units))


def _words(said: Any, where: str) -> tuple[str, ...]:
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise ValueError(f"{where}: a list is expected, found {said!r}")
    return tuple(str(word) for word in said)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(said: Any, known: set[str], where: str) -> None:
    if not isinstance(said, dict):
        raise ValueError(f"{where}: expected `key: value` lines, found {said!r}")
    for key in said:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; the keys are {', '.join(sorted(known))}")
