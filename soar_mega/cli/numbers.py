"""Numbers of a command, as verbs check them."""

import argparse


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """ValueError that names the option where one of these is below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
