"""docs/settings.md from the dataclasses of the settings: each setting, what it may be, its default, what it does.

    python tools/settings_page.py        after a change of soar_mega/config.py or of the settings of a stage

What a setting does is the comment above it or beside it, there or in the class that it is inherited from.
"""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arguments import no_arguments
from gpu_page import table

from soar_mega.config import Recipe, StageConfig
from soar_mega.config_checks import RULES
from soar_mega.recipe import Stages
from soar_mega.rules import Rule, one_of
from soar_mega.stages import SETTINGS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"

HEAD = """\
# The settings of a recipe

This page is made by `tools/settings_page.py` from `soar_mega/config.py` and `soar_mega/stages/`.

A recipe is a YAML file of these groups; what it leaves out has the default. Words behind it on the command line change
it: `soar-mega train recipes/tiny/soar.yaml optimizer.lr=1e-4 stage.shift=null`. With `--show` the command prints all
settings that a run would have, as its `run_config.yaml` will hold them, and ends. An unknown name, a value out of its
range and settings that do not go together are errors that say what would be right.

Steps are optimizer steps. More about the settings of layers and FP8 is in [precision.md](precision.md), of data in
[data.md](data.md), of adapters in [lora.md](lora.md), of layouts and checkpoints in [cluster.md](cluster.md), of what
is watched in a run in [operations.md](operations.md), of reinforcement learning in [rl.md](rl.md) and
[collecting.md](collecting.md).
"""

STAGE = """\
What is trained on, and how. `stage.name` is the method, which says what else this group has: the settings of every
table below that names it. Where two of them have the same setting, the later one counts."""


def page(stages: Stages = SETTINGS) -> str:
    """The whole page."""
    kinds = typing.get_type_hints(Recipe)
    parts = [HEAD]
    for group in dataclasses.fields(Recipe):
        parts.append(f"## {group.name}\n")
        if group.name == "stage":
            parts += [f"{STAGE}\n", *stage_tables(stages)]
        else:
            kind = kinds[group.name]
            parts += [f"{title(kind)}\n", *rows(group.name, kind, RULES), ""]
    return "\n".join(parts).rstrip() + "\n"


def stage_tables(stages: Stages) -> list[str]:
    """A table for each class of settings, headed by the methods that have them."""
    classes = dict.fromkeys(
        kind for last in stages.values() for kind in reversed(last.__mro__) if issubclass(kind, StageConfig)
    )
    lines: list[str] = []
    for kind in classes:
        methods = [name for name, settings in stages.items() if issubclass(settings, kind)]
        rules: dict[str, Rule] = {f"stage.{key}": rule for key, rule in kind.rules.items()}
        rules["stage.name"] = one_of(*stages)
        heading = "every method" if kind is StageConfig else f"stage.name: {', '.join(methods)}"
        lines += [f"### {heading}\n", *([] if kind is StageConfig else [f"{title(kind)}\n"])]
        lines += [*rows("stage", kind, rules, next(iter(stages))), ""]
    return lines


def title(kind: type) -> str:
    """What a class says of itself in its first line."""
    return inspect.getdoc(kind).partition("\n")[0]  # type: ignore[union-attr]


def rows(group: str, kind: type, rules: Mapping[str, Rule], method: str = "") -> list[str]:
    """The table of the settings that a class itself declares; `method` is the default of stage.name."""
    hints, own = typing.get_type_hints(kind), comments(kind)
    lines = []
    for field in dataclasses.fields(kind):
        if field.name not in own or (field.name == "name" and kind is not StageConfig):
            continue
        name = f"{group}.{field.name}"
        default = method if field.name == "name" else default_of(field)
        may_be = range_of(hints[field.name], rules.get(name))
        lines.append([f"`{name}`", may_be, f"`{written(default)}`", words(kind, field.name)])
    return table(["setting", "may be", "default", "what it does"], lines)


def range_of(hint: Any, rule: Rule | None) -> str:
    """The type, with the range of a number; where a rule lists what there is, that alone."""
    types = typing.get_args(hint) or (hint,)
    type_ = f"`{inspect.formatannotation(hint).replace('None', 'null')}`"
    if rule is None:
        return type_
    if {int, float}.isdisjoint(types) or len(types) > 2:
        return f"{rule[1]}{', or null' if type(None) in types else ''}"
    return f"{type_}, {rule[1]}"


def words(kind: type, name: str) -> str:
    """What a setting does, from the class nearest to `kind` that says it. ValueError where none does."""
    for each in kind.__mro__:
        if dataclasses.is_dataclass(each) and (found := comments(each).get(name)):
            return found.replace("<", "\\<").replace("*", "\\*")
    raise ValueError(f"{kind.__name__}.{name} has no words: write a comment beside it")


def comments(kind: type) -> dict[str, str]:
    """The settings that a class itself declares, each with the comment above it and beside it."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line, token in said.items() if token.line.lstrip().startswith("#")}
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            here = [said[line].string for line in range(first, node.end_lineno + 1) if line in said]  # type: ignore[operator]
            here = [text.lstrip("# ") for text in here if not text.startswith("# type:")]
            found[node.target.id] = " ".join(here)
    return found


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """The value of a setting that nobody gives."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def written(value: Any) -> str:
    """As a recipe has it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def main() -> None:
    no_arguments(__doc__)
    PAGE.write_text(page())
    print(f"Written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
