"""What training costs, in forwards of a sample."""

from soar_mega.config import StageConfig


def forward_units(stage: StageConfig) -> float:
    """Of learning from a sample once, and its part of the drawing where the method draws; a backward is two."""
    forwards = stage.forwards()
    return forwards.answers + 3 * forwards.points + stage.drawing_forwards
