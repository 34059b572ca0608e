"""Whole diffusers pipeline folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from soar_mega.convert.save import on_rank_zero, save_transformer
from soar_mega.models.chunks import ModelChunks
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.mmdit import MMDiT


def read_pipeline_config(folder: str | Path) -> MMDiTConfig:
    """The sizes of a pipeline's transformer; a ValueError names what is missing."""
    return MMDiTConfig.from_diffusers(folder)


def scheduler_shift(folder: str | Path) -> float:
    """The timestep shift of a pipeline's FlowMatchEulerDiscreteScheduler.

    Raises:
        ValueError: no scheduler, or one whose shift is not a constant.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): set stage.shift instead") from error
    if content.get("use_dynamic_shifting"):
        raise ValueError(f"{path} shifts by image size (use_dynamic_shifting): set stage.shift to a number")
    return float(content.get("shift", 1.0))


def save_pipeline(
    model: MMDiT | ModelChunks,
    source_pipeline: str | Path,
    folder: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a pipeline folder: our transformer, every other part copied from `source_pipeline`.

    A collective over the whole world. The folder appears under its name only when it is complete; an older one of
    the same name is replaced.

    Args:
        tensors: this rank's shard by global name, in place of the model's own tensors (an EMA); see `save_transformer`.

    Raises:
        OSError: rank 0 could not write; raised on every rank.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    on_rank_zero(lambda: _copy_parts(Path(source_pipeline), partial), partial)
    save_transformer(model, partial / "transformer", tensors)
    on_rank_zero(lambda: _replace(partial, folder), folder)


def _copy_parts(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(
        source, target, ignore=lambda parent, _: ["transformer"] if Path(parent) == source else []
    )


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    if old.exists():
        shutil.rmtree(old)
