"""JSON files of this program's own: one object, or one value a line. A crash leaves the old file or the new one."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from soar_mega.user_files import read_object


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object as `write_bytes` does."""
    write_bytes(path, json_bytes(values))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file when it is missing or damaged."""
    return read_object(path, "prepare again")


def json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def line_bytes(rows: Iterable[Any]) -> bytes:
    """JSON values, one a line; whatever they hold, a line is ASCII and has no end of a line in it."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def lines_of(content: bytes) -> list[Any]:
    """The values of `line_bytes`. ValueError: a line is no JSON."""
    return [json.loads(line) for line in content.splitlines()]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
