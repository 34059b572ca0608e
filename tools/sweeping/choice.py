"""What a screening chooses for its study, by the rule in docs/study.md, and how it gets into the study's file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CANDIDATES = "soar_"  # what the names of arms begin with that can be chosen
MEASURE = "best"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An arm and its control.

    Attributes:
        overrides: of the arm alone, and
        control_overrides: those of its control.
    """

    arm: str
    control: str
    overrides: list[str]
    control_overrides: list[str]


def chosen_arm(result: Mapping[str, Any]) -> str:
    """Of a sweep's results: the cheapest of the candidates within one standard error of the best one.

    Raises:
        ValueError: there is no candidate.
    """
    measure = result["measures"][MEASURE]
    means = {name: each["mean"] for name, each in measure["arms"].items() if name.startswith(CANDIDATES)}
    if not means:
        raise ValueError(
            f"no arm of this sweep has a name that begins with {CANDIDATES}: nothing to choose from"
        )
    best = max(means, key=lambda name: means[name])
    error = measure["chance"]["deviation"] / measure["arms"][best]["runs"] ** 0.5
    work = {arm["name"]: arm["iterations"] * arm["units"] for arm in result["arms"]}
    near = [name for name, mean in means.items() if mean >= means[best] - error]
    return min(near, key=lambda name: (work[name], -means[name]))


def choice(result: Mapping[str, Any], screening: Path) -> Choice:
    """With the overrides that the screening's file gives the chosen arm and the first of its references."""
    arms = yaml.safe_load(screening.read_text(encoding="utf-8"))["arms"]
    arm = chosen_arm(result)
    control = arms[arm]["references"][0]
    return Choice(
        arm=arm,
        control=control,
        overrides=arms[arm].get("overrides", []),
        control_overrides=arms[control].get("overrides", []),
    )


def put_into(study: str, chosen: Choice) -> str:
    """The text of a study with the lists that it calls &chosen and &control_of_chosen replaced.

    Raises:
        ValueError: one of them is not there.
    """
    for anchor, words in (("chosen", chosen.overrides), ("control_of_chosen", chosen.control_overrides)):
        said = json.dumps(words).replace("\\", r"\\")
        study, count = re.subn(rf"(?<=&{anchor} )\[.*\]$", said, study, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the study has {count} lists that it calls &{anchor}: it must have one")
    return study
