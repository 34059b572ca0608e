"""Training methods: each a stage, three pure functions of a batch."""

from soar_mega.config import StageConfig
from soar_mega.stages.points import Points, Queries, Stage
from soar_mega.stages.sft import Sft
from soar_mega.stages.sft_multi import SftMulti
from soar_mega.stages.soar import Soar

STAGES = {"soar": Soar, "sft": Sft, "sft_multi": SftMulti}


def make_stage(config: StageConfig, shift: float) -> Soar:
    """The stage a recipe names; `shift` is used where the recipe leaves its own open."""
    if config.name not in STAGES:
        raise ValueError(f"stage.name: {config.name!r} is unknown; choose one of {', '.join(STAGES)}")
    return STAGES[config.name](config, shift if config.shift is None else config.shift)


__all__ = ["STAGES", "Points", "Queries", "Sft", "SftMulti", "Soar", "Stage", "make_stage"]
