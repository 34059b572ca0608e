"""What a diffusers pipeline folder holds beside its transformer."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from soar_mega.flow import Schedule
from soar_mega.user_files import number, read_object

INDEX = "model_index.json"
# What a scheduler is whose sigmas follow from its shift alone.
PLAIN_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
}
DYNAMIC_SHIFT = {  # of diffusers, where the scheduler does not say
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
LARGEST_LOGARITHM = 50.0  # of a shift
SHIFT_ADVICE = "name the shift yourself, with stage.shift in a recipe and --shift in sample and evaluate"


def pipeline_schedule(
    folder: str | Path, tokens: int, *, samples_evenly: bool, shift: float | None = None
) -> Schedule:
    """The schedule that a pipeline samples by.

    Args:
        tokens: of an image, as `scheduler_shift`.
        samples_evenly: of the transformer's family.
        shift: a constant one in the place of its scheduler's.

    Raises:
        ValueError: as `scheduler_shift`, where no shift is given.
    """
    is_dynamic = False
    if shift is None:
        shift, is_dynamic = scheduler_shift(folder, tokens)
    return Schedule(shift, spacing="even" if samples_evenly else "dynamic" if is_dynamic else "constant")


def scheduler_shift(folder: str | Path, tokens: int) -> tuple[float, bool]:
    """The timestep shift of a pipeline's FlowMatchEulerDiscreteScheduler, and whether it is dynamic.

    Args:
        tokens: of an image, on which a dynamic shift depends: its logarithm lies on a straight line through base_shift
            at base_image_seq_len and max_shift at max_image_seq_len.

    Raises:
        ValueError: no such scheduler, or one whose sigmas are not those of a constant shift; names the setting.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    content = read_object(path, SHIFT_ADVICE)
    for name, known in PLAIN_SCHEDULER.items():
        if (found := content.get(name, known)) not in (known, None):
            raise ValueError(f"{path} has {name} {found!r}, and only {known!r} is known: {SHIFT_ADVICE}")
    if content.get("use_dynamic_shifting"):
        return _dynamic_shift(content, path, tokens), True
    shift = number({"shift": 1.0, **content}, "shift", path)
    if shift <= 0:
        raise ValueError(f"{path}: shift is {shift}: it must be above 0 (SD3.5: 3.0)")
    return shift, False


def _dynamic_shift(content: dict[str, Any], path: Path, tokens: int) -> float:
    if (kind := content.get("time_shift_type", "exponential")) != "exponential":
        raise ValueError(
            f"{path} has time_shift_type {kind!r}, and only 'exponential' is known: {SHIFT_ADVICE}"
        )
    settings = {**DYNAMIC_SHIFT, **content}
    base, most = number(settings, "base_shift", path), number(settings, "max_shift", path)
    first, last = number(settings, "base_image_seq_len", path), number(settings, "max_image_seq_len", path)
    if first >= last:
        raise ValueError(f"{path}: base_image_seq_len is {first}: it must be below max_image_seq_len {last}")
    logarithm = base + (most - base) * (tokens - first) / (last - first)
    if not abs(logarithm) < LARGEST_LOGARITHM:
        raise ValueError(f"{path}: base_shift {base} and max_shift {most} give no shift: {SHIFT_ADVICE}")
    return math.exp(logarithm)


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder has a model_index.json, which says of what a pipeline consists."""
    return bool(str(folder)) and Path(folder, INDEX).is_file()


def pipeline_parts(folder: str | Path) -> dict[str, int]:
    """The files that a pipeline needs beside its transformer: model_index.json, and what is in the folders it names.

    Each is opened once, so that copying them later will not fail for what can be seen now.

    Returns:
        Sizes in bytes by names within the folder.

    Raises:
        ValueError: model_index.json is none, or a part of it is missing, or a link leads nowhere.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    index = folder / INDEX
    content = read_object(index)
    files = {INDEX: index}
    for name, kind in content.items():
        # what begins with _ and a plain value are settings; [null, null] is a part that this pipeline does without
        if name.startswith("_") or name == "transformer" or not isinstance(kind, list) or None in kind:
            continue
        if Path(name).name != name or not name or not os.path.isdir(folder / name):
            raise ValueError(f"{index} names the part {name}, but {folder / name} is missing")
        files.update({file.relative_to(folder).as_posix(): file for file in _files_below(folder / name)})
    return {name: _readable_size(file) for name, file in files.items()}


def refuse_other_transformer(folder: str | Path, class_name: str) -> None:
    """ValueError where a pipeline draws with another class of transformer: with this one it could not be loaded."""
    index = Path(folder) / INDEX
    kind = read_object(index).get("transformer")
    if isinstance(kind, list) and kind and kind[-1] != class_name:
        raise ValueError(
            f"{index} is of a pipeline with a {kind[-1]}, and these are weights of a {class_name}"
        )


def copy_parts(source: Path, names: Iterable[str], target: Path) -> None:
    """Copies files of a pipeline; links are followed, and permissions are those of new files."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        around = {os.path.realpath(each) for each in (Path(parent), *Path(parent).parents)}
        for inner in folders:
            if os.path.realpath(Path(parent, inner)) in around:
                raise ValueError(f"{Path(parent, inner)} is a link to a folder around it: remove it")
        yield from (Path(parent, name) for name in names)


def _readable_size(file: Path) -> int:
    if file.is_symlink() and not file.exists():
        raise ValueError(
            f"{file} is a link to {os.readlink(file)}, which is missing: the pipeline is not complete"
        )
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    with open(file, "rb"):
        return file.stat().st_size
