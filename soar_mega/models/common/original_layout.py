"""How a family's authors lay out its weights in one file, against diffusers' tensors of the same content.

Their tensors are diffusers' with the rows of several joined, or with two halves the other way round: one table serves
both directions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class OriginalTensor:
    """One tensor of an original file.

    Attributes:
        name: without a prefix.
        keys: of diffusers' tensors whose rows it consists of, in this order.
        is_swapped: of its one tensor, the halves of the rows are the other way round.
    """

    name: str
    keys: tuple[str, ...]
    is_swapped: bool = False


@dataclass(frozen=True)
class OriginalLayout:
    """What a family knows of original files.

    Attributes:
        mark: the name of a tensor that only this family's files have.
        config: a diffusers config.json from names and shapes in a file, and for what these do not tell from another
            one, which may be empty; KeyError names the tensor that is missing for that.
        tensors: all tensors of a file, by such a config.
    """

    mark: str
    config: Callable[[Shapes, dict[str, Any]], dict[str, Any]]
    tensors: Callable[[dict[str, Any]], list[OriginalTensor]]


def renamed(
    ours: str, theirs: Mapping[str, str], kinds: Iterable[str] = ("weight", "bias")
) -> list[OriginalTensor]:
    """Weights and biases of linears that are the same in both.

    Args:
        ours: prefix of diffusers' names; theirs: the original name of each.
    """
    return [
        OriginalTensor(f"{original}.{kind}", (f"{ours}{name}.{kind}",))
        for name, original in theirs.items()
        for kind in kinds
    ]


def fused(original: str, keys: Iterable[str]) -> list[OriginalTensor]:
    """Weight and bias of one linear that diffusers has as several."""
    names = tuple(keys)
    return [
        OriginalTensor(f"{original}.{kind}", tuple(f"{n}.{kind}" for n in names))
        for kind in ("weight", "bias")
    ]


def swapped(original: str, key: str) -> list[OriginalTensor]:
    """Weight and bias of a modulation that gives shift and scale, and in diffusers scale and shift."""
    return [OriginalTensor(f"{original}.{kind}", (f"{key}.{kind}",), True) for kind in ("weight", "bias")]


def count(shapes: Shapes, blocks: str) -> int:
    """How many blocks there are whose names begin with `blocks`.N."""
    found = {name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")}
    return max((int(number) + 1 for number in found if number.isdecimal()), default=0)


@dataclass(frozen=True)
class Rows:
    """Where rows start..stop of one of diffusers' tensors are in an original one."""

    name: str
    place: int  # of the first of them
    start: int
    stop: int


def original_shapes(table: Iterable[OriginalTensor], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shape of each original tensor, from those of diffusers' tensors."""
    return {
        tensor.name: (sum(shapes[key][0] for key in tensor.keys), *shapes[tensor.keys[0]][1:])
        for tensor in table
    }


def rows_of_keys(table: Iterable[OriginalTensor], shapes: Shapes) -> dict[str, list[Rows]]:
    """Where the rows of each of diffusers' tensors are, in the order of the rows."""
    found: dict[str, list[Rows]] = {}
    for tensor in table:
        place = 0
        for key in tensor.keys:
            length = shapes[key][0]
            if tensor.is_swapped:
                half = length // 2
                found[key] = [Rows(tensor.name, half, 0, half), Rows(tensor.name, 0, half, length)]
            else:
                found[key] = [Rows(tensor.name, place, 0, length)]
            place += length
    return found
