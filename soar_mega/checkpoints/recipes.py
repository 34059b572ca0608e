"""run_config.yaml of a run folder: the recipe of its newest start, with those of earlier starts kept beside it."""

import logging
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from soar_mega.checkpoints.run_folder import RECIPE, RunFolder, write_durably
from soar_mega.config import Recipe
from soar_mega.recipe import read_yaml, recipe_to_yaml

logger = logging.getLogger(__name__)

# settings that no two runs share, or that say how another one is loaded
OF_ONE_RUN = ("checkpoint.save", "checkpoint.load", "checkpoint.finetune", "checkpoint.load_ema")


def write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Writes the recipe of this start. Where the one before was another, says in what, and keeps it.

    Called by one process. The older ones are run_config.1.yaml, run_config.2.yaml and so on.
    """
    path, text = run.path / RECIPE, recipe_to_yaml(recipe)
    before = path.read_text() if path.is_file() else text
    if before != text:
        kept = next(p for i in count(1) if not (p := path.with_suffix(f".{i}.yaml")).exists())
        write_durably(kept, before)
        changes = "\n  ".join(changes_since(run, recipe))
        logger.warning("the recipe is not that of the last start, which is kept as %s:\n  %s", kept, changes)
    write_durably(path, text)


def changes_since(run: RunFolder, recipe: Recipe) -> list[str]:
    """In what a recipe differs from that of the run's newest start, if there was one."""
    path = run.path / RECIPE
    if not path.is_file():
        return []
    return differences(_settings(path.read_text()), _settings(recipe_to_yaml(recipe)))


def model_settings(checkpoint: Path) -> dict[str, Any]:
    """The model group of the run that wrote a checkpoint; empty where its recipe is not beside it."""
    return read_settings(RunFolder(checkpoint.parent)).get("model", {})


def read_settings(run: RunFolder) -> dict[str, dict[str, Any]]:
    """run_config.yaml of a run by group and key; empty where it is not there. ValueError where it holds no groups."""
    path = run.path / RECIPE
    settings = read_yaml(path) if path.is_file() else {}
    if not isinstance(settings, dict) or not all(isinstance(group, dict) for group in settings.values()):
        raise ValueError(f"{path} is no recipe of this program: put back what it was, or move it away")
    return settings


def tell_differences(checkpoint: Path, recipe: Recipe) -> None:
    """Logs in what a recipe differs from that of the run whose checkpoint it loads, if that is beside it."""
    before = by_name(read_settings(RunFolder(checkpoint.parent)))
    now = by_name(yaml.safe_load(recipe_to_yaml(recipe)))
    told = differences(*({k: v for k, v in each.items() if k not in OF_ONE_RUN} for each in (before, now)))
    if before and told:
        logger.warning("the recipe is not that of %s, which is loaded:\n  %s", checkpoint, "\n  ".join(told))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "group.key was this and is that" for each setting that is another."""
    names = dict.fromkeys([*before, *now])
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def by_name(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of all groups as group.key."""
    return {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}


def _settings(text: str) -> dict[str, Any]:
    """By group.key; empty where the text is no recipe."""
    try:
        return by_name({group: dict(keys) for group, keys in dict(yaml.safe_load(text)).items()})
    except (yaml.YAMLError, TypeError, ValueError):
        return {}
