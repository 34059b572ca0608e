"""Words such as train.seed=1 anywhere among the options of a command."""

import argparse
import re
from collections.abc import Sequence
from typing import Any


def take_overrides(parser: argparse.ArgumentParser) -> None:
    """argparse takes an optional list of words in one place only; overrides may stand between the options too."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="group.key=value",
        help="settings that differ from the recipe",
    )
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str], namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        overrides = [word for word in args if re.match(r"\w+\.\w+=", word)]
        found, rest = parse([word for word in args if word not in overrides], namespace)
        found.overrides = [*found.overrides, *overrides]
        return found, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
