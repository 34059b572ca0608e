"""What is left out of a prepared folder: written down, told, and judged.

rejects.jsonl       each sample that is left out, and why
duplicates.jsonl    each sample with the same image file as an earlier one, left out or not
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soar_mega.data.items import Reject
from soar_mega.data.json_files import line_bytes, lines_of, write_bytes

log = logging.getLogger(__name__)

REJECTS_FILE = "rejects.jsonl"
DUPLICATES_FILE = "duplicates.jsonl"
NAMED = 5  # rejects named in a message


def write_rejects(folder: Path, rejects: Sequence[Reject], total: int, skip_invalid: bool) -> None:
    """Write down all that was left out of `total` samples, and tell how many of each kind.

    ValueError where something is wrong with any of them and that is not allowed.
    """
    path = folder / REJECTS_FILE
    write_bytes(path, line_bytes(map(asdict, rejects)))
    for kind, count in Counter(reject.kind for reject in rejects).most_common():
        log.info("%10d  %s", count, kind)
    wrong = [reject for reject in rejects if not reject.by_choice]
    if not wrong or skip_invalid:
        return
    named = "\n".join(f"  {reject.name}: {reject.reason}" for reject in wrong[:NAMED])
    more = f"\n  and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    raise ValueError(
        f"{len(wrong)} of {total} samples cannot be used (all are listed in {path}):\n{named}"
        f"{more}\nRepair or remove them and run the same command again, or leave them out with --skip-invalid"
    )


def read_rejects(folder: Path) -> list[Reject]:
    """What `write_rejects` wrote; nothing where it did not. ValueError naming the file when it is damaged."""
    path = folder / REJECTS_FILE
    if not path.is_file():
        return []
    try:
        rows = lines_of(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: remove it ({error})") from error
    return [_reject(row, path) for row in rows]


def rejects_of(index: Mapping[str, Any], path: Path) -> list[Reject]:
    """Those of a shard; ValueError where its index, read from `path`, does not list them."""
    return [_reject(row, path) for row in index.get("rejects", [None])]


def write_duplicates(folder: Path, duplicates: Sequence[tuple[str, str]], dropped: bool) -> None:
    """Write down and tell which samples (name, name of the first) have an image file that came before."""
    path = folder / DUPLICATES_FILE
    if not duplicates:
        path.unlink(missing_ok=True)
        return
    write_bytes(path, line_bytes({"name": name, "same_as": first} for name, first in duplicates))
    log.warning(
        "%d samples have the same image file as an earlier one and are %s, such as %s and %s (all in %s)",
        len(duplicates),
        "left out" if dropped else "kept",
        *duplicates[0],
        path,
    )


def _reject(row: Any, path: Path) -> Reject:
    words = ("name", "reason", "kind")
    if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in words):
        return Reject(**{key: row[key] for key in words}, by_choice=row.get("by_choice") is True)
    raise ValueError(f"{path} holds {str(row)[:60]} where a rejected sample's name and reason belong")
