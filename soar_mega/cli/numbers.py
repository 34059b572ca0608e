"""Numbers of a command, as verbs check them."""

import argparse
import math
from collections.abc import Sequence


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """ValueError that names the option where one of these is below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def check_guidance_scales(scales: Sequence[float]) -> None:
    """ValueError for one that is infinite or NaN."""
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"--guidance-scale must be a number, not {scale}")
