"""Imports go down the floors of CONTRIBUTING.md, never up, also inside functions; the library needs no extra, and
each of its files has a name of its own."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    **dict.fromkeys(("tools", "examples", "__main__"), 9),
    "cli": 8,
    **dict.fromkeys(("launch", "handoff"), 7),
    "training": 6,
    **dict.fromkeys(("engines", "checkpoints", "faults"), 5),
    "stages": 4,
    **dict.fromkeys(("models", "data", "evaluation", "convert", "rewards"), 3),
    "kernels": 2,
    "flow": 1,
}
LINKED = ("kernels", "examples")  # from beside the library, in a checkout without an installed one
EXTRAS = ("sklearn", "matplotlib")  # of the digits and of figures


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module: str) -> int:
    """Of a dotted name: soar_mega.data.shards, kernels.sums, tools.sweep."""
    first, *rest = module.split(".")
    return FLOORS.get(rest[0] if first == "soar_mega" and rest else first, 0)


def test_imports_go_down_only() -> None:
    files = [*(ROOT / "soar_mega").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 200
    upwards = []
    for path in files:
        own = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
        upwards += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in imported(path)
            if floor(name) > own or (name.startswith(EXTRAS) and own < 9)
        ]
    assert not upwards


def test_a_name_is_one_file() -> None:
    """But for a family's files, which are called as the other's, and for what a command is called as."""
    families = (path.parent for path in (ROOT / "soar_mega/models").glob("*/__init__.py"))
    rooms = (*(f"models/{family.name}/" for family in families if family.name != "common"), "cli/")
    files = [path.relative_to(ROOT / "soar_mega") for path in (ROOT / "soar_mega").rglob("*.py")]
    names = Counter(
        f.name for f in files if f.name != "__init__.py" and not str(f).startswith(rooms + LINKED)
    )
    assert [name for name, count in names.items() if count > 1] == []
