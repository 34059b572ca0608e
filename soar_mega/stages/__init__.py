"""Training methods: each a stage, three pure functions of a batch, with its settings, which need no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soar_mega.config import Recipe, StageConfig
from soar_mega.recipe import read_recipe
from soar_mega.stages.collecting_settings import CollectingConfig, DiffusionNftConfig, FlowGrpoConfig
from soar_mega.stages.settings import SETTINGS, MixFlowConfig, SftConfig, SftMultiConfig, SoarConfig

if TYPE_CHECKING:
    from soar_mega.flow import Spacing
    from soar_mega.stages.points import Stage


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`soar_mega.recipe.read_recipe` with all stages of this package."""
    return read_recipe(path, overrides, SETTINGS)


def make_stage(config: StageConfig, shift: float, *, spacing: "Spacing" = "constant") -> "Stage":
    """The stage a recipe names; `shift` is used where the recipe leaves its own open.

    Args:
        spacing: of a sampler's steps (`Schedule.inference_sigmas`).

    Raises:
        ValueError: there is no stage of that name.
    """
    from soar_mega.stages.diffusion_nft import DiffusionNft
    from soar_mega.stages.flow_grpo import FlowGrpo
    from soar_mega.stages.mixflow import MixFlow
    from soar_mega.stages.sft import Sft
    from soar_mega.stages.sft_multi import SftMulti
    from soar_mega.stages.soar import Soar

    stages: dict[str, Any] = {
        "soar": Soar,
        "sft": Sft,
        "sft_multi": SftMulti,
        "mixflow": MixFlow,
        "flow_grpo": FlowGrpo,
        "diffusion_nft": DiffusionNft,
    }
    if config.name not in stages:
        raise ValueError(f"stage.name: {config.name!r} is unknown; choose one of {', '.join(stages)}")
    wanted = SETTINGS[config.name]
    assert type(config) is wanted, f"{config.name} has other settings than {type(config).__name__}"
    make, shift = stages[config.name], shift if config.shift is None else config.shift
    stage: Stage = make(config, shift, spacing)
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
