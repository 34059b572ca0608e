"""Weights of a transformer in a form that others wrote, recognised by what is in it: a diffusers folder or a file of
one, or a single file in a family's own layout."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from soar_mega.convert.checks import check_shapes, diffusers_shapes
from soar_mega.convert.finite_tensors import is_finite
from soar_mega.convert.original_file import OriginalFile, config_of, layout_of
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.safetensors_writer import Writer
from soar_mega.models.common.original_layout import OriginalLayout, Shapes
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.family import config_file, families, read_sizes


class _Tensors(Protocol):
    def dtype(self, key: str) -> torch.dtype: ...

    def where(self, key: str) -> str: ...

    def blocks(self, key: str) -> Iterator[tuple[int, Tensor]]: ...


class Weights:
    """All tensors of a transformer under diffusers' names, none of which has been read.

    Attributes:
        sizes: of the transformer.
        shapes: by diffusers' names.
    """

    def __init__(self, sizes: Sizes, shapes: Shapes, tensors: _Tensors) -> None:
        self.sizes, self.shapes, self._tensors = sizes, dict(shapes), tensors

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of each tensor's numbers."""
        return {key: self._tensors.dtype(key) for key in self.shapes}

    def blocks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """The rows of a tensor, a few at a time, each with the number of the first.

        Raises:
            ValueError: they hold NaN or infinite numbers; names file and tensor.
        """
        for row, block in self._tensors.blocks(key):
            if not is_finite(block):
                raise ValueError(f"{self._tensors.where(key)} holds NaN or infinite numbers")
            yield row, block

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor. Raises what `blocks` does."""
        whole = torch.empty(self.shapes[key], dtype=dtype)
        for row, block in self.blocks(key):
            whole[row : row + len(block)] = block
        return whole

    def copy_to(self, writer: Writer) -> None:
        """Write every tensor, a few rows at a time. Raises what `blocks` does."""
        try:
            for key in self.shapes:
                for row, block in self.blocks(key):
                    writer.write(key, block, row)
            writer.close()
        finally:
            writer.abandon()


@contextlib.contextmanager
def open_weights(path: Path, pipeline_dir: str | Path | None = None) -> Iterator[Weights]:
    """The weights that a pipeline or transformer folder, one of its files, or a single file holds.

    Args:
        pipeline_dir: a diffusers folder whose configuration tells what a single file does not.

    Raises:
        ValueError: names file and tensor where one is missing, unknown, misshaped or of another type, or the file
            is truncated or of an architecture that no family has.
    """
    if path.is_dir():
        path = config_file(path).parent
    with Reader(path) as reader:
        found = layout_of(reader)
        if found is None:
            yield _diffusers_weights(reader, path, pipeline_dir)
        else:
            yield _original_weights(reader, *found, pipeline_dir)


class _DiffusersTensors:
    def __init__(self, reader: Reader) -> None:
        self.dtype, self.blocks, self._files = reader.dtype, reader.blocks, reader.files

    def where(self, key: str) -> str:
        return f"{key} in {self._files[key]}"


def _diffusers_weights(reader: Reader, path: Path, pipeline_dir: str | Path | None) -> Weights:
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        sizes = read_sizes(folder / "config.json")
    elif pipeline_dir:
        sizes = read_sizes(pipeline_dir)
    else:
        some = ", ".join(list(reader.files)[:3])
        known = ", ".join(family.products for family in families().values() if family.original)
        raise ValueError(
            f"{path} is of no known architecture ({some}, ...): it is no original file of {known}, and there is no "
            "config.json beside it, as there is in a diffusers folder (or name such a folder with --pipeline-dir)"
        )
    shapes = diffusers_shapes(sizes)
    check_shapes(shapes, reader, "config.json")
    return Weights(sizes, shapes, _DiffusersTensors(reader))


def _original_weights(
    reader: Reader, layout: OriginalLayout, prefix: str, pipeline_dir: str | Path | None
) -> Weights:
    told = read_sizes(pipeline_dir).to_diffusers() if pipeline_dir else {}
    config = config_of(reader, layout, prefix, told)
    try:
        sizes = read_sizes(config)
    except ValueError as error:
        raise ValueError(f"{reader.path}: {error}") from error
    config = sizes.to_diffusers()
    if differing := [
        f"{key} {config.get(key)!r} and {told[key]!r}" for key in told if config.get(key) != told[key]
    ]:
        raise ValueError(f"{reader.path} and {pipeline_dir} are of different models: {', '.join(differing)}")
    shapes = diffusers_shapes(sizes)
    return Weights(sizes, shapes, OriginalFile(reader, layout, prefix, config, shapes))
