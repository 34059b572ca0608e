"""The folder that `prepare` writes: who may write into it, with which settings it was begun, and what is done in it."""

import fcntl
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from soar_mega.data.items import Reject
from soar_mega.data.shard_writer import DATASET_FILE, shard_name, write_bytes, write_json
from soar_mega.data.shards import read_index, read_json

log = logging.getLogger(__name__)

SETTINGS_FILE = "prepare.json"  # written first: where it is, what is named here is this program's
LOCK_FILE = ".lock"
REJECTS_FILE = "rejects.jsonl"
DUPLICATES_FILE = "duplicates.jsonl"
SURVEY_FOLDER = ".survey"
FETCHED_FOLDER = ".fetched"
HELD_OUT_FOLDER = "held_out"


class Lock:
    """Keeps a second `prepare` out of a folder while any process of the first one lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: IO[str] = open(folder / LOCK_FILE, "a")  # noqa: SIM115 open as long as it is held

    def take(self) -> int:
        """By the first process alone. ValueError when another `prepare` holds it."""
        try:
            self._flock(fcntl.LOCK_EX)
        except BlockingIOError as error:
            raise ValueError(
                f"another `soar-mega prepare` is writing {self._folder}: wait, or give another folder"
            ) from error
        self._flock(fcntl.LOCK_SH)
        return 0

    def share(self) -> None:
        """By the others, when the first one has taken it."""
        self._flock(fcntl.LOCK_SH)

    def close(self) -> None:
        self._file.close()

    def _flock(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems have no locks
            log.warning(
                "%s cannot be locked (%s): see to it that one prepare writes it", self._folder, error.strerror
            )


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Mark a folder as this program's. ValueError when it is somebody else's or was begun with other settings."""
    path = folder / SETTINGS_FILE
    if path.is_file():
        refuse_other_settings(folder, read_json(path), settings)
    elif others := sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_FILE):
        raise ValueError(
            f"{folder} holds {others[0]} but no {SETTINGS_FILE}: it is not a folder that this program began. Give "
            "another one"
        )
    write_json(path, settings)


def refuse_other_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """ValueError naming the first setting that differs."""
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name} {old.get(name)}, not {value}: keep the settings, remove the folder or "
                "give another one"
            )


def index_file(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


def complete_shard(folder: Path, number: int, digest: str) -> list[Reject] | None:
    """The rejects of a shard that was completed from the same items; None when there is none."""
    tar, index = folder / f"{shard_name(number)}.tar", index_file(folder, number)
    if not (tar.is_file() and index.is_file()):
        return None
    try:
        values = read_index(index)
        rejects = rejects_of(values, index)
    except ValueError as error:
        log.warning("%s: the shard is written again", error)
        return None
    if values.get("digest") != digest or tar.stat().st_size != values["bytes"]:
        return None
    return rejects


def rejects_of(index: Mapping[str, Any], path: Path) -> list[Reject]:
    """Those of a shard; ValueError where its index, read from `path`, does not list them."""
    return [_reject(row, path) for row in index.get("rejects", [None])]


def remove_leftover_shards(folder: Path, count: int) -> None:
    """Those behind the last one: the folder was begun with more images."""
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"shard-(\d{6,})\.(tar|json)(\.tmp)?", path.name)
        if name and (int(name[1]) >= count or name[3]):
            log.info("%s is left over and is removed", path)
            path.unlink()


def write_rejects(folder: Path, rejects: Sequence[Reject]) -> None:
    lines = [json.dumps(asdict(reject)) + "\n" for reject in rejects]
    write_bytes(folder / REJECTS_FILE, "".join(lines).encode())


def read_rejects(folder: Path) -> list[Reject]:
    path = folder / REJECTS_FILE
    try:
        lines = path.read_text().splitlines() if path.is_file() else []
        return [_reject(json.loads(line), path) for line in lines]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: remove it ({error})") from error


def is_finished(folder: Path) -> bool:
    """Whether the last thing that is written is there."""
    return (folder / DATASET_FILE).is_file()


def _reject(row: Any, path: Path) -> Reject:
    words = ("name", "reason", "kind")
    if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in words):
        return Reject(**{key: row[key] for key in words}, by_choice=row.get("by_choice") is True)
    raise ValueError(f"{path} holds {str(row)[:60]} where a rejected sample's name and reason belong")
