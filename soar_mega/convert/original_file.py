"""Single files in a family's own layout, such as sd3.5_medium.safetensors or flux1-dev.safetensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.convert.checks import check_shapes
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.safetensors_writer import MARK, FileWriter, Planned
from soar_mega.models.common.original_layout import (
    OriginalLayout,
    Shapes,
    original_shapes,
    rows_of_keys,
)
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import families

PREFIX = "model.diffusion_model."
# in files that hold a whole pipeline: what is no part of the transformer
OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")


def layout_of(reader: Reader) -> tuple[OriginalLayout, str] | None:
    """The layout that a file has, and the prefix of its names; None where it is no family's own."""
    for layout in filter(None, (family.original for family in families().values())):
        for prefix in (PREFIX, ""):
            if prefix + layout.mark in reader.files:
                return layout, prefix
    return None


def config_of(reader: Reader, layout: OriginalLayout, prefix: str, told: dict[str, Any]) -> dict[str, Any]:
    """The diffusers config.json of a file by its names and shapes.

    Args:
        told: a configuration for what these do not tell.

    Raises:
        ValueError: a tensor is missing or misshaped that tells a size; names it and the file.
    """
    held = {key.removeprefix(prefix): reader.shape(key) for key in reader.files if key.startswith(prefix)}
    shapes = _Shapes(held)
    try:
        return layout.config(shapes, told)
    except KeyError as error:
        raise ValueError(f"{reader.path} is not complete: {prefix}{error.args[0]} is missing") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{reader.path}: {prefix}{shapes.asked} has the shape {held[shapes.asked]}, which no model of this kind has"
        ) from error


class _Shapes(dict[str, tuple[int, ...]]):
    """Keeps the name of the tensor that was asked for last."""

    asked = ""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        self.asked = name
        return super().__getitem__(name)


class OriginalFile:
    """The tensors of a single file under diffusers' names.

    Args:
        config: a whole diffusers configuration; shapes: of diffusers' tensors by it.

    Raises:
        ValueError: tensors are missing, unknown or of another shape.
    """

    def __init__(
        self, reader: Reader, layout: OriginalLayout, prefix: str, config: dict[str, Any], shapes: Shapes
    ) -> None:
        self._reader, self._prefix = reader, prefix
        table = layout.tensors(config)
        check_shapes(original_shapes(table, shapes), reader, "an original file of its sizes", prefix)
        _refuse_strangers(reader, prefix)
        self._rows = rows_of_keys(table, shapes)

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor's numbers."""
        return self._reader.dtype(self._name(key))

    def where(self, key: str) -> str:
        """Name and file of a tensor, for messages."""
        return f"{self._name(key)} in {self._reader.path}"

    def blocks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """The rows of a tensor, a few at a time, each with the number of the first."""
        for rows in self._rows[key]:
            stop = rows.place + rows.stop - rows.start
            for first, block in self._reader.blocks(self._prefix + rows.name, rows.place, stop):
                yield first - rows.place + rows.start, block

    def _name(self, key: str) -> str:
        return self._prefix + self._rows[key][0].name


def _refuse_strangers(reader: Reader, prefix: str) -> None:
    if not prefix:
        return
    known = (prefix, *OTHER_PARTS)
    strange = [key for key in reader.files if not key.startswith(known)]
    if strange:
        raise ValueError(
            f"{reader.path} holds {strange[0]} and {len(strange) - 1} more that are neither of the transformer "
            f"({prefix}...) nor of another part of a pipeline ({'..., '.join(OTHER_PARTS)}...)"
        )


class OriginalWriter:
    """Writes diffusers' tensors into a single file.

    Args:
        shapes, dtypes: of diffusers' tensors; those that are joined in the file have one type.
    """

    def __init__(
        self,
        path: Path,
        sizes: Sizes,
        shapes: Shapes,
        dtypes: dict[str, torch.dtype],
        prefix: str = "",
    ) -> None:
        layout = sizes.family.original
        if layout is None:
            raise ValueError(f"of {sizes.family.products} no layout of single files is known")
        table = layout.tensors(sizes.to_diffusers())
        self._rows, self._prefix = rows_of_keys(table, shapes), prefix
        wanted = original_shapes(table, shapes)
        assert self._rows.keys() == shapes.keys(), "the family's table covers all tensors"
        plan = []
        for tensor in table:
            types = {dtypes[key] for key in tensor.keys}
            if len(types) > 1:
                raise ValueError(
                    f"{', '.join(tensor.keys)} are joined in the file but have several types: give --dtype"
                )
            plan.append(Planned(prefix + tensor.name, wanted[tensor.name], types.pop()))
        self._file = FileWriter(path, plan, MARK)

    def write(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or as many rows of it as are given, from `row` on; each once."""
        for rows in self._rows[key]:
            start, stop = max(rows.start, row), min(rows.stop, row + len(tensor))
            if start < stop:
                place = rows.place + start - rows.start
                self._file.write(self._prefix + rows.name, tensor[start - row : stop - row], place)

    def close(self) -> None:
        """Everything must have been written."""
        self._file.close()

    def abandon(self) -> None:
        """Close the file, finished or not."""
        self._file.abandon()
