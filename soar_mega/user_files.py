"""JSON files that others wrote or that were damaged: whatever one holds, what is wrong is a ValueError naming it."""

import json
from pathlib import Path
from typing import Any

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/"  # what Git leaves where it did not bring the file itself
)
LARGEST = 1e300  # of numbers in configurations


def read_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        advice: what to do where there is none, for the message.

    Raises:
        ValueError: the file is missing, or it holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}){_ending(advice)}") from error
    return object_in(content, path, advice)


def object_in(content: bytes, path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object that was read from `path`; as `read_object` otherwise."""
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({lfs_advice(path) or error}){_ending(advice)}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {_shown(values)} instead of a JSON object{_ending(advice)}")
    return values


def whole(values: dict[str, Any], key: str, path: Path, least: int = 1, most: int = 2**31) -> int:
    """A whole number of a JSON object read from `path`; ValueError naming both where it is missing or none."""
    value = values.get(key)
    if type(value) is not int or not least <= value <= most:  # true is an int too
        raise ValueError(
            f"{path}: {key} is {_shown(value)}, a whole number from {least} to {most} is expected"
        )
    return value


def number(values: dict[str, Any], key: str, path: Path) -> float:
    """A finite number of a JSON object read from `path`; ValueError naming both where it is missing or none."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{path}: {key} is {_shown(value)}, a number is expected")
    return float(value)


def lfs_advice(path: Path) -> str:
    """What to do about a file that is a pointer of Git's large file storage; "" for every other file."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return ""
    advice = "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    return f"{path.name} {advice}" if pointer else ""


def is_text(words: str) -> bool:
    """Whether a string can be written and tokenised: JSON and YAML can spell halves of characters, which cannot."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ending(advice: str) -> str:
    return f": {advice}" if advice else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
