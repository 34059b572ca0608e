"""What training costs, in forwards of a sample."""

from soar_mega.config import Forwards


def forward_units(forwards: Forwards) -> float:
    """Of learning from a sample once; a backward counts as two forwards."""
    return forwards.answers + 3 * forwards.points
