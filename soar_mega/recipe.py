"""Recipes: settings read from YAML, with trailing ``group.key=value`` overrides.

A recipe is the whole description of a run. Unknown keys, wrong types and impossible values are errors that name
the key and say what would be right.
"""

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from soar_mega.config import Recipe, StageConfig
from soar_mega.config_checks import check_recipe

# the settings of each training method, by its name; the first is the default
Stages = Mapping[str, type[StageConfig]]


def read_recipe(path: str | Path, overrides: Sequence[str], stages: Stages) -> Recipe:
    """Read a recipe file, apply overrides such as ``train.train_iters=100``, and check the whole.

    The stage's settings are those of the method that stage.name chooses, wherever it is said.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key, a value or a combination is wrong; the message names the key and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    in_file = [
        (f"{group}.{key}", value)
        for group, settings in _mapping(_read_yaml(_text(path), str(path)), str(path)).items()
        for key, value in _mapping(settings, f"{path}: {group}").items()
    ]
    beside = [_split(override) for override in overrides]
    chosen = next((value for name, value in [*in_file, *beside][::-1] if name == "stage.name"), None)
    recipe = Recipe(stage=_stage(chosen, stages))
    for name, value in in_file:
        _set(recipe, name, value, str(path), stages)
    for name, text in beside:
        # text is taken as it stands: a path may hold any character that YAML gives a meaning
        is_text = _kinds(recipe).get(name) is str
        _set(recipe, name, text if is_text else _read_yaml(text, name), "command line", stages)
    check_recipe(recipe)
    return recipe


def _stage(name: Any, stages: Stages) -> StageConfig:
    """The settings of a method, at their defaults."""
    if name is None:
        name = next(iter(stages))
    if not isinstance(name, str) or name not in stages:
        raise ValueError(f"stage.name is {name!r}: it must be one of {', '.join(stages)}")
    return stages[name](name=name)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; ValueError naming the file where it is no UTF-8 or no YAML."""
    return _read_yaml(_text(path), str(path))


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with every value written out; `read_recipe` of this text gives an equal recipe."""
    return yaml.dump(dataclasses.asdict(recipe), Dumper=_Dumper, sort_keys=False)


NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


class _Loader(yaml.SafeLoader):
    """YAML where 2e-5 is a number (YAML 1.1 wants 2.0e-5) and 0100 and 1:30 are none (YAML 1.1: 64 and 90), a key given
    twice is an error, and patterns need no quotes."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        if first != "*"
    }

    def fetch_alias(self) -> None:
        # * stands before the name of an anchor, or else it begins a pattern: *.attn.to_q
        if self.peek(1).isalnum():
            super().fetch_alias()
        else:
            self.fetch_plain()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise yaml.MarkedYAMLError(problem="a key is a name", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.1 or `_Loader` would take for something else than text."""


_DIGITS = list("-+.0123456789")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), _DIGITS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _DIGITS)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _DIGITS)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML's own words for dates, numbers and tags that are none
        raise ValueError(f"{where}: not valid YAML: {error!r}"[:MAX_MESSAGE]) from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected `key: value` lines, found {value!r}")
    return value


def _split(override: str) -> tuple[str, str]:
    name, equals, value = override.partition("=")
    if not equals:
        raise ValueError(
            f"{override!r} is not an override: write group.key=value, for example train.train_iters=100"
        )
    return name, value


def _kinds(recipe: Recipe) -> dict[str, Any]:
    """The type of every setting: {"train.seed": int, ...}."""
    groups = {group.name: type(getattr(recipe, group.name)) for group in dataclasses.fields(recipe)}
    return {
        f"{name}.{key}": kind
        for name, group in groups.items()
        for key, kind in _kinds_of_group(group).items()
    }


def _kinds_of_group(group: type[Any]) -> dict[str, Any]:
    kinds = typing.get_type_hints(group)
    return {field.name: kinds[field.name] for field in dataclasses.fields(group)}


def _set(recipe: Recipe, name: str, value: Any, where: str, stages: Stages) -> None:
    kinds = _kinds(recipe)
    group, _, key = name.partition(".")
    if name not in kinds:
        others = [other for other, settings in stages.items() if key in _kinds_of_group(settings)]
        if group == "stage" and others:
            # by its kind: its name is still the file's where an override is to follow
            chosen = next(other for other, kind in stages.items() if kind is type(recipe.stage))
            raise ValueError(
                f"{where}: {name} is a setting of stage.name={' and '.join(others)}, not of "
                f"{chosen}, whose settings are {', '.join(_kinds_of_group(stages[chosen]))}"
            )
        raise ValueError(f"{where}: unknown key {name!r}: {_advice(name, list(kinds))}")
    setattr(getattr(recipe, group), key, _convert(value, kinds[name], f"{where}: {name}"))


def _advice(name: str, known: list[str]) -> str:
    """What the writer of an unknown key probably meant."""
    group, _, key = name.rpartition(".")
    groups = list(dict.fromkeys(other.partition(".")[0] for other in known))
    namesakes = [other for other in known if other.partition(".")[2] == key]
    close = namesakes or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if group in groups:
        return f"the keys of {group} are {', '.join(k.partition('.')[2] for k in known if k.startswith(group + '.'))}"
    return f"the groups are {', '.join(groups)}"


MAX_MESSAGE = 300  # characters
LARGEST: dict[Any, float] = {int: 2**63 - 1, float: sys.float_info.max, bool: 0, str: 0}  # of numbers
_WORDS = {bool: "true or false", int: "a whole number below 2^63", float: "a number", str: "text (quote it)"}


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A YAML value as the declared type of its setting."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, _alternative(value, arguments), where)
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if origin in (list, dict):
        raise ValueError(f"{where}: expected a {'list' if origin is list else 'mapping'}, found {value!r}")
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST[kind]
    if kind is float and number:
        return float(value)
    if kind is int and number and int(value) == value:
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ValueError(f"{where}: expected {_WORDS[kind]}, found {value!r}"[:MAX_MESSAGE])


def _alternative(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Of the types that a setting may have, the one that a list or a mapping is read as, else the first."""
    return next((kind for kind in kinds if typing.get_origin(kind) is type(value)), kinds[0])
