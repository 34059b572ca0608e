"""run_config.yaml of a run folder: the recipe of its newest start, with those of earlier starts kept beside it."""

import logging
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from soar_mega.checkpoints.run_folder import RECIPE, RunFolder, write_durably
from soar_mega.config import Recipe
from soar_mega.recipe import recipe_to_yaml

logger = logging.getLogger(__name__)


def write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Writes the recipe of this start. Where the one before was another, says in what, and keeps it.

    Called by one process. The older ones are run_config.1.yaml, run_config.2.yaml and so on.
    """
    path, text = run.path / RECIPE, recipe_to_yaml(recipe)
    before = path.read_text() if path.is_file() else text
    if before != text:
        kept = next(p for i in count(1) if not (p := path.with_suffix(f".{i}.yaml")).exists())
        write_durably(kept, before)
        changes = "\n  ".join(differences(_settings(before), _settings(text)))
        logger.warning("the recipe is not that of the last start, which is kept as %s:\n  %s", kept, changes)
    write_durably(path, text)


def model_settings(checkpoint: Path) -> dict[str, Any]:
    """The model group of the run that wrote a checkpoint; empty where its recipe is not beside it."""
    path = checkpoint.parent / RECIPE
    if not path.is_file():
        return {}
    settings: dict[str, Any] = yaml.safe_load(path.read_text())["model"]
    return settings


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "group.key was this and is that" for each setting that is another."""
    names = dict.fromkeys([*before, *now])
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _settings(text: str) -> dict[str, Any]:
    """By group.key; empty where the text is no recipe."""
    try:
        groups = dict(yaml.safe_load(text))
        return {
            f"{group}.{key}": value for group, keys in groups.items() for key, value in dict(keys).items()
        }
    except (yaml.YAMLError, TypeError, ValueError):
        return {}
