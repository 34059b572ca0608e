"""The folder that `prepare` writes: who may write into it, with which settings it was begun, and what is done in it."""

import fcntl
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from soar_mega.data.items import Reject
from soar_mega.data.json_files import read_json, write_json
from soar_mega.data.rejects import rejects_of
from soar_mega.data.shard_files import read_index
from soar_mega.data.shard_writer import DATASET_FILE, shard_name

log = logging.getLogger(__name__)

SETTINGS_FILE = "prepare.json"  # written first: where it is, what is named here is this program's
LOCK_FILE = ".lock"
SURVEY_FOLDER = ".survey"
FETCHED_FOLDER = ".fetched"
HELD_OUT_FOLDER = "held_out"


class Lock:
    """Keeps a second `prepare` out of a folder while any process of the first one lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # for reading too: a network file system shares no lock without. Open as long as it is held
        self._file: IO[str] = open(folder / LOCK_FILE, "a+")  # noqa: SIM115

    def take(self) -> None:
        """By the first process alone. ValueError when another `prepare` holds it."""
        try:
            self._flock(fcntl.LOCK_EX)
        except BlockingIOError as error:
            raise ValueError(
                f"another `soar-mega prepare` is writing {self._folder}: wait, or give another folder"
            ) from error
        self._flock(fcntl.LOCK_SH)

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


def remove_leftover_shards(folder: Path, count: int) -> None:
    """Those behind the last one: the folder was begun with more images."""
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"shard-(\d{6,})\.(tar|json)(\.tmp)?", path.name)
        if name and (int(name[1]) >= count or name[3]):
            log.info("%s is left over and is removed", path)
            path.unlink()


def is_finished(folder: Path) -> bool:
    """Whether the last thing that is written is there."""
    return (folder / DATASET_FILE).is_file()
