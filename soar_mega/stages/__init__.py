"""Training methods: each a stage, three pure functions of a batch, with its settings."""

from collections.abc import Sequence
from pathlib import Path

from soar_mega.config import Recipe, StageConfig
from soar_mega.recipe import read_recipe
from soar_mega.stages.points import Points, Queries, Stage
from soar_mega.stages.sft import Sft, SftConfig
from soar_mega.stages.sft_multi import SftMulti, SftMultiConfig
from soar_mega.stages.soar import Soar, SoarConfig

STAGES = {"soar": (SoarConfig, Soar), "sft": (SftConfig, Sft), "sft_multi": (SftMultiConfig, SftMulti)}
SETTINGS: dict[str, type[StageConfig]] = {name: settings for name, (settings, _) in STAGES.items()}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`soar_mega.recipe.read_recipe` with all stages of this package."""
    return read_recipe(path, overrides, SETTINGS)


def make_stage(config: StageConfig, shift: float) -> Stage:
    """The stage a recipe names; `shift` is used where the recipe leaves its own open."""
    if config.name not in STAGES:
        raise ValueError(f"stage.name: {config.name!r} is unknown; choose one of {', '.join(STAGES)}")
    settings, stage = STAGES[config.name]
    assert type(config) is settings, f"{config.name} has other settings than {type(config).__name__}"
    return stage(config, shift if config.shift is None else config.shift)  # type: ignore[arg-type]


__all__ = [
    "SETTINGS",
    "STAGES",
    "Points",
    "Queries",
    "Sft",
    "SftConfig",
    "SftMulti",
    "SftMultiConfig",
    "Soar",
    "SoarConfig",
    "Stage",
    "load_recipe",
    "make_stage",
]
