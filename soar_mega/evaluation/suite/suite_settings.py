"""What an evaluation consists of, as a YAML file says it.

size: 512x512                        # pixels; left out: what each transformer draws by itself
weights: tiny                        # of the scorers: random, made in the folder of the evaluation; left out: --weights
guidance_scale: [4.5, 1]             # the first one is the table's
steps: [40]                          # likewise; further ones are drawn at the first guidance scale
sets:
  geneval: {prompts: geneval, scorers: [gen_eval]}           # geneval/test_metadata.jsonl
  drawbench: {prompts: drawbench, scorers: [clip_score, pick_score], noises: 2}
  photos: {prompts: captions.txt, scorers: [aesthetic], real: photos}    # FID and KID to the images there
published:                           # rows of the table to compare with, by scorer
  SD3.5-M: {gen_eval: 0.63}
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soar_mega.data.info import bucket_size
from soar_mega.evaluation.drift import SPANS
from soar_mega.flow.samplers import SOLVERS
from soar_mega.recipe import read_yaml

RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "evaluation"


@dataclass(frozen=True, kw_only=True)
class PromptSetSettings:
    """One file of prompts and what judges its images.

    Attributes:
        prompts: a file, or a folder with <split>_metadata.jsonl or <split>.txt.
        noises: images of each line; a prompt that stands in several lines gets as many for each of them.
        real: a folder of images whose distance to those that are drawn is measured; None: it is not.
    """

    name: str
    prompts: Path
    scorers: tuple[str, ...]
    split: str = "test"
    noises: int = 1
    real: Path | None = None


@dataclass(frozen=True, order=True)
class Point:
    """How images are sampled: a place in the sweep."""

    guidance_scale: float
    steps: int

    def __str__(self) -> str:
        return f"guidance {self.guidance_scale:g}, {self.steps} steps"


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """How the exposure bias is measured, on shards that no run was trained on ("": it is not)."""

    held_out: str = ""
    spans: tuple[tuple[float, float], ...] = SPANS
    samples: int = 128
    steps: int = 5


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A whole evaluation.

    Attributes:
        guidance_scales, steps: the first of each is that of the table.
        size: (width, height) in pixels; None: the transformer's own.
        tiny_weights: the scorers get tiny random weights; their values mean nothing.
        published: {row: {scorer: value}} to compare with.
    """

    name: str
    sets: tuple[PromptSetSettings, ...]
    guidance_scales: tuple[float, ...]
    steps: tuple[int, ...]
    size: tuple[int, int] | None = None
    tiny_weights: bool = False
    solver: str = "euler"
    seed: int = 0
    drift: DriftSettings = DriftSettings()
    published: Mapping[str, Mapping[str, float]]

    @property
    def points(self) -> list[Point]:
        """Every guidance scale at the first number of steps, every other number of steps at the first scale."""
        first = [Point(scale, self.steps[0]) for scale in self.guidance_scales]
        return first + [Point(self.guidance_scales[0], steps) for steps in self.steps[1:]]


def load_suite(name: str, prompts_dir: str | Path | None = None) -> Suite:
    """Reads a suite: a YAML file, or a name among recipes/evaluation (paper, tiny, digits).

    Args:
        prompts_dir: where the files of prompts lie; None is the folder of the suite's file.

    Raises:
        ValueError: there is no such suite, or it says what cannot be; names the key.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(path.stem for path in sorted(RECIPES.glob("*.yaml")))
        raise ValueError(f"--suite {name}: there is no {file}; give a YAML file, or one of {known}")
    said = read_yaml(file)
    known_keys = {"size", "weights", "guidance_scale", "steps", "solver", "seed", "sets", "published"}
    _check_keys(said, known_keys, str(file))
    if not said.get("sets"):
        raise ValueError(f"{file}: sets is missing: name at least one file of prompts and its scorers")
    if said.get("weights", "tiny") != "tiny":
        raise ValueError(
            f"{file}: weights: only tiny can stand here, not {said['weights']!r}; a folder goes to --weights"
        )
    folder = Path(prompts_dir) if prompts_dir else file.parent
    suite = Suite(
        name=file.stem,
        sets=tuple(
            _prompt_set(key, value, folder, f"{file}: sets.{key}") for key, value in said["sets"].items()
        ),
        guidance_scales=_numbers(said.get("guidance_scale", [4.5, 1]), f"{file}: guidance_scale"),
        steps=tuple(
            _whole(value, f"{file}: steps") for value in _list(said.get("steps", [40]), f"{file}: steps")
        ),
        size=bucket_size(str(said["size"])) if said.get("size") else None,
        tiny_weights="weights" in said,
        solver=said.get("solver", "euler"),
        seed=_whole(said.get("seed", 0), f"{file}: seed", least=0),
        published=_published(said.get("published", {}), f"{file}: published"),
    )
    if suite.solver not in SOLVERS:
        raise ValueError(f"{file}: solver: one of {', '.join(SOLVERS)}, found {suite.solver!r}")
    return suite


def sampled_at(suite: Suite, guidance_scales: list[float] | None, steps: list[int] | None) -> Suite:
    """The suite with other guidance scales and numbers of steps, where they are given."""
    return replace(
        suite,
        guidance_scales=_numbers(guidance_scales, "--guidance-scale")
        if guidance_scales
        else suite.guidance_scales,
        steps=tuple(_whole(each, "--steps") for each in dict.fromkeys(steps)) if steps else suite.steps,
    )


def _prompt_set(name: Any, said: Any, folder: Path, where: str) -> PromptSetSettings:
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"{where}: a name of letters, digits, - and _ is expected: it names files")
    _check_keys(said, {"prompts", "scorers", "split", "noises", "real"}, where)
    scorers = said.get("scorers")
    if not isinstance(scorers, list) or not scorers or not all(isinstance(each, str) for each in scorers):
        raise ValueError(f"{where}: scorers: a list of names is expected, found {scorers!r}")
    if not isinstance(said.get("prompts"), str):
        raise ValueError(f"{where}: prompts: a file or folder is expected, found {said.get('prompts')!r}")
    return PromptSetSettings(
        name=name,
        prompts=folder / said["prompts"],
        scorers=tuple(dict.fromkeys(scorers)),
        split=str(said.get("split", "test")),
        noises=_whole(said.get("noises", 1), f"{where}: noises"),
        real=_images(folder / str(said["real"]), f"{where}: real") if said.get("real") else None,
    )


def _images(folder: Path, where: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{where}: {folder} is no folder of images")
    return folder


def _published(said: Any, where: str) -> dict[str, dict[str, float]]:
    _check_keys(said, None, where)
    rows = {}
    for row, values in said.items():
        _check_keys(values, None, f"{where}.{row}")
        rows[str(row)] = {
            str(key): _numbers([value], f"{where}.{row}.{key}")[0] for key, value in values.items()
        }
    return rows


def _check_keys(said: Any, known: set[str] | None, where: str) -> None:
    if not isinstance(said, dict):
        raise ValueError(f"{where}: expected `key: value` lines, found {said!r}")
    for key in said:
        if known is not None and key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; the keys are {', '.join(sorted(known))}")


def _list(value: Any, where: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where}: at least one value is needed")
    return list(dict.fromkeys(values))


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    values = _list(value, where)
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
            raise ValueError(f"{where}: a number is expected, found {each!r}")
    return tuple(float(each) for each in values)


def _whole(value: Any, where: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{where}: a whole number of at least {least} is expected, found {value!r}")
    return value
