"""Training methods: each a stage, three pure functions of a batch, with its settings, which need no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega.config import Recipe, StageConfig
from soar_mega.recipe import read_recipe
from soar_mega.stages.settings import SETTINGS, MixFlowConfig, SftConfig, SftMultiConfig, SoarConfig

if TYPE_CHECKING:
    from soar_mega.stages.points import Stage


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`soar_mega.recipe.read_recipe` with all stages of this package."""
    return read_recipe(path, overrides, SETTINGS)


def make_stage(config: StageConfig, shift: float) -> "Stage":
    """The stage a recipe names; `shift` is used where the recipe leaves its own open."""
    from soar_mega.stages.mixflow import MixFlow
    from soar_mega.stages.sft import Sft
    from soar_mega.stages.sft_multi import SftMulti
    from soar_mega.stages.soar import Soar

    stages = {"soar": Soar, "sft": Sft, "sft_multi": SftMulti, "mixflow": MixFlow}
    if config.name not in stages:
        raise ValueError(f"stage.name: {config.name!r} is unknown; choose one of {', '.join(stages)}")
    wanted = SETTINGS[config.name]
    assert type(config) is wanted, f"{config.name} has other settings than {type(config).__name__}"
    return stages[config.name](config, shift if config.shift is None else config.shift)  # type: ignore[arg-type]


__all__ = [
    "SETTINGS",
    "MixFlowConfig",
    "SftConfig",
    "SftMultiConfig",
    "SoarConfig",
    "load_recipe",
    "make_stage",
]
