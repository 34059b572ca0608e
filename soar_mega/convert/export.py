"""Diffusers folders of a model's weights, written as a whole."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from soar_mega.convert.checks import diffusers_shapes
from soar_mega.convert.original_file import OriginalWriter
from soar_mega.convert.pipeline_folder import copy_parts, pipeline_parts, refuse_other_transformer
from soar_mega.convert.safetensors_writer import MARK
from soar_mega.convert.save import AS_STORED, WeightFiles, on_rank_zero, write_transformer, write_weights
from soar_mega.models.common.chunks import ModelChunks
from soar_mega.models.common.transformer import Transformer
from soar_mega.outputs import OutputFolder, in_place_of


def save_folder(
    model: Transformer | ModelChunks,
    folder: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
    files: WeightFiles = AS_STORED,
    notes: Mapping[str, str] | None = None,
    pipeline_dir: str | Path | None = None,
) -> None:
    """Write a transformer folder, or a pipeline folder: our transformer, the other parts copied from `pipeline_dir`.

    A collective over the whole world. The folder appears under its name only when it is complete; an older one that
    this program wrote is replaced.

    Args:
        tensors: this rank's shard by global name, in place of the model's own tensors (an EMA), as for
            `write_transformer`.
        notes: texts to write beside the parts, by file name.

    Raises:
        ValueError: the folder holds what this program did not write, or the pipeline is not complete.
        OSError: rank 0 could not write. Both are raised on every rank.
    """
    with replacing(folder) as new:
        transformer = new
        if pipeline_dir:
            source, transformer = Path(pipeline_dir), new / "transformer"
            on_rank_zero(lambda: refuse_other_transformer(source, model.sizes.family.class_name), folder)
            on_rank_zero(lambda: copy_parts(source, pipeline_parts(source), new), folder)
        write_transformer(model, transformer, tensors, files)
        on_rank_zero(lambda: _write_notes(new, notes or {}), folder)


def save_original_file(
    model: Transformer | ModelChunks,
    path: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
    files: WeightFiles = AS_STORED,
    prefix: str = "",
) -> None:
    """Write a single file in the layout of the model's family. A collective over a world of one process.

    Args:
        tensors: as for `write_transformer`.
        prefix: of the names in the file.

    Raises:
        ValueError: there is what this program did not write.
        OSError: it could not be written.
    """
    shapes = diffusers_shapes(model.sizes)
    dtypes = dict.fromkeys(shapes, files.dtype or model.config.params_dtype)
    with in_place_of(path, MARK.encode()) as new:
        writer = OriginalWriter(new, model.sizes, shapes, dtypes, prefix)
        write_weights(model, lambda: writer, path, tensors, files.dtype)


def _write_notes(folder: Path, notes: Mapping[str, str]) -> None:
    for name, text in notes.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Where to write what is to be at `folder` when all is done."""
    output = OutputFolder(folder)
    try:
        on_rank_zero(output.begin, folder)
        yield output.new
        on_rank_zero(output.publish, folder)
    finally:
        output.give_up()
