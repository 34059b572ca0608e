"""docs/cluster.md: its commands are ones that the parser takes, and what it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from soar_mega.cli import build_parser
from soar_mega.launch.chain import load_chain
from soar_mega.stages import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = re.findall(r"^    (?:\w+=\w+ )?soar-mega (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = build_parser().parse_args(shlex.split(command))
    if arguments.verb == "launch":
        load_recipe(arguments.recipe, arguments.overrides)
    if arguments.verb == "chain":
        load_chain(arguments.chain)


def test_what_it_names_is_there() -> None:
    assert len(COMMANDS) >= 8
    for path in re.findall(r"\b((?:recipes|tools|tests|soar_mega)/[\w/.]+\w)", PAGE):
        assert (ROOT / path).exists(), path
