"""What tools are asked, checked before they begin: numbers that may be, and places to write."""

import argparse
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from soar_mega.rules import Rule, at_least


def no_arguments(description: str | None) -> None:
    """Of a tool that takes none: --help says what it does, and everything else is refused."""
    argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()


def number(kind: type[int] | type[float], rule: Rule) -> Callable[[str], Any]:
    """A type of argparse: a number that may be what the rule says."""
    holds, words = rule

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {noun}, {words}")
        return value

    return read


positive = number(int, at_least(1))


def latent_size(text: str) -> tuple[int, int]:
    """A type of argparse: height and width, as in 64x64."""
    height, cross, width = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} must be a height and a width, as in 64x64")
    return positive(height), positive(width)


def result_file(given: str | Path | None, name: str, flag: str = "--out") -> Path:
    """Where a measurement is written: as given, or in benchmarks/results with the date before the name.

    Raises:
        SystemExit: nothing can be written there.
    """
    path = Path(given or f"benchmarks/results/{date.today()}-{name}.json")
    was_there = path.exists()
    result_folder(path.parent, flag)
    try:
        path.open("ab").close()  # an earlier result stays until there is another
        if not was_there:
            path.unlink()
    except OSError as error:
        raise cannot_write(path, error, flag) from None
    return path


def result_folder(path: Path, flag: str = "--out") -> Path:
    """The folder, which is made where there is none.

    Raises:
        SystemExit: nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise cannot_write(path, error, flag) from None
    return path


def cannot_write(path: Path, error: OSError, flag: str) -> SystemExit:
    return SystemExit(f"{flag}: {path} cannot be written: {error.strerror}")
