"""Training methods: each a stage, three pure functions of a batch, with its settings, which need no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soar_mega.config import Recipe, StageConfig
from soar_mega.recipe import read_recipe
from soar_mega.stages.settings import (
    SETTINGS,
    CollectingConfig,
    DiffusionNftConfig,
    FlowGrpoConfig,
    MixFlowConfig,
    SftConfig,
    SftMultiConfig,
    SoarConfig,
)

if TYPE_CHECKING:
    from soar_mega.stages.points import Stage


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`soar_mega.recipe.read_recipe` with all stages of this package."""
    return read_recipe(path, overrides, SETTINGS)


def make_stage(
    config: StageConfig, shift: float, *, is_dynamic: bool = False, updates_per_collection: int = 1
) -> "Stage":
    """The stage a recipe names; `shift` is used where the recipe leaves its own open.

    Args:
        is_dynamic: the shift belongs to a number of image tokens, as FLUX's pipelines choose it.
        updates_per_collection: of a stage that learns from its own samples, `CollectingConfig.updates_per_collection`.

    Raises:
        ValueError: there is no stage of that name.
    """
    from soar_mega.stages.diffusion_nft import DiffusionNft
    from soar_mega.stages.flow_grpo import FlowGrpo
    from soar_mega.stages.mixflow import MixFlow
    from soar_mega.stages.sft import Sft
    from soar_mega.stages.sft_multi import SftMulti
    from soar_mega.stages.soar import Soar

    of_samples: dict[str, Any] = {"soar": Soar, "sft": Sft, "sft_multi": SftMulti, "mixflow": MixFlow}
    of_own_samples: dict[str, Any] = {"flow_grpo": FlowGrpo, "diffusion_nft": DiffusionNft}
    names = [*of_samples, *of_own_samples]
    if config.name not in names:
        raise ValueError(f"stage.name: {config.name!r} is unknown; choose one of {', '.join(names)}")
    wanted = SETTINGS[config.name]
    assert type(config) is wanted, f"{config.name} has other settings than {type(config).__name__}"
    shift = shift if config.shift is None else config.shift
    if config.name in of_own_samples:
        stage: Stage = of_own_samples[config.name](config, shift, is_dynamic, updates_per_collection)
    else:
        stage = of_samples[config.name](config, shift)
    return stage


__all__ = [
    "SETTINGS",
    "CollectingConfig",
    "DiffusionNftConfig",
    "FlowGrpoConfig",
    "MixFlowConfig",
    "SftConfig",
    "SftMultiConfig",
    "SoarConfig",
    "load_recipe",
    "make_stage",
]
