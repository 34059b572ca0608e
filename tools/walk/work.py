"""What training costs, in forwards of a sample."""

from soar_mega.config import StageConfig
from soar_mega.stages import CollectingConfig


def forward_units(stage: StageConfig) -> float:
    """Of learning from a sample once, and its part of the drawing where the method draws; a backward is two."""
    forwards, drawing = stage.forwards(), 0.0
    if isinstance(stage, CollectingConfig):
        drawing = stage.sampling_forwards() / stage.updates_per_sample
    return forwards.answers + 3 * forwards.points + drawing
