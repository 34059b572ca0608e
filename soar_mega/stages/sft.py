"""Supervised fine-tuning: SOAR with no auxiliary points, by the same code."""

from dataclasses import replace

from soar_mega.config import StageConfig
from soar_mega.stages.soar import Soar


class Sft(Soar):
    """Plain flow matching on the ideal ray."""

    def __init__(self, config: StageConfig, shift: float) -> None:
        super().__init__(replace(config, num_auxiliary_points=0), shift)
