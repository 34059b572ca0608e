"""The README's Python example runs, and its commands are ones that the parser takes."""

import re
import shlex
from pathlib import Path

import pytest

from soar_mega.cli import build_parser
from soar_mega.stages import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^    (?:torchrun .* -m soar_mega|soar-mega) (.*)$", README.replace("\\\n", " "), re.MULTILINE
)


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert tuple(names["states"].shape) == (2, 6, 4, 8, 8)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses_and_its_recipe_loads(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = build_parser().parse_args(shlex.split(command, comments=True))
    if arguments.verb == "train":
        load_recipe(arguments.recipe, arguments.overrides)


def test_commands_and_paths_are_there() -> None:
    assert len(COMMANDS) >= 7
    for path in re.findall(r"`((?:soar_mega|recipes|tools|docs)/[\w/.]*)`|\]\(([\w/.]+)\)", README):
        assert (ROOT / (path[0] or path[1]).rstrip("/")).exists(), path
