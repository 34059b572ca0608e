"""Copies of remote shards on a disk of this machine: a folder for each set, shared by all processes of the machine.

    CACHE_DIR/.soar_mega-lock          held while room is made
    CACHE_DIR/0123456789abcdef/        of one set, named for where it is and for its dataset.json
        .soar_mega-cache               says that this program made the folder, and of what
        dataset.json, index.bin, empty.safetensors
        shard-000000.tar               whole, as it is renamed when it is
        shard-000001.tar.part          being copied by the process that holds its lock; without one, left by a kill

Only what is listed here is ever removed, and only in folders with that mark.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from soar_mega import distributed
from soar_mega.data.json_files import write_bytes
from soar_mega.data.open_index import checksum_of
from soar_mega.data.remote import RemoteFolder
from soar_mega.data.sample_index import INDEX_FILE
from soar_mega.data.shard_files import read_dataset_file
from soar_mega.data.shard_writer import DATASET_FILE, EMPTY_FILE

log = logging.getLogger(__name__)

LOCK, MARK, PART = ".soar_mega-lock", ".soar_mega-cache", ".part"
GIGABYTE = 10**9
IDLE_SECONDS = 900.0  # after which another set's shard gives way
FULL_SECONDS = 300.0  # until room is looked for again


class ShardCache:
    """The copies of one remote set. Shards come while the run goes on, and are read remotely until they are there.

    Shards of the set itself never give way to others of it: every sample is as likely to be next, so nothing is won.

    Args:
        folder: where the set is.
        where: what the user calls it.
        root: the cache's folder, made where it is missing.
        limit: bytes of shards in it, of all sets.

    Raises:
        ValueError: the set cannot be read, or the folder cannot be written.
    """

    def __init__(self, folder: RemoteFolder, where: str, root: Path, limit: int) -> None:
        self._remote, self._root, self._limit = folder, root, limit
        dataset = folder.read(DATASET_FILE)
        self.path = root / hashlib.sha256(f"{where}\n".encode() + dataset).hexdigest()[:16]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with _locked(self.path / LOCK):
                (self.path / MARK).write_text(f"copies of {where}\n")
                write_bytes(self.path / DATASET_FILE, dataset)
                values = read_dataset_file(self.path)
            for name, key in ((INDEX_FILE, "index_crc32"), (EMPTY_FILE, "empty_crc32")):
                self._bring(name, values.get(key), where)
            self._sizes = {f"{shard['name']}.tar": int(shard["bytes"]) for shard in values["shards"]}
            with _locked(root / LOCK):
                self._make_room(0, needs_idle=False)
        except OSError as error:
            raise ValueError(f"data.cache_dir {root} cannot be written: {error.strerror}") from error
        self._tell(where)
        self._full_until = 0.0
        self._wanted: SimpleQueue[str] = SimpleQueue()
        self._asked: set[str] = set()
        self._thread: threading.Thread | None = None

    def find(self, name: str) -> Path | None:
        """The copy of a shard, which counts as used now; None where there is none, and then one is on its way.

        Where parts of it cannot be read remotely, it is waited for.
        """
        path = self.path / name
        if not path.is_file():
            if self._remote.reads_parts:
                self._want(name)
                return None
            if not self._fetch(name, waits=True):
                return None
        with contextlib.suppress(OSError):  # another process may have removed it by now
            os.utime(path)
            return path
        return None

    def read(self, name: str, start: int, size: int) -> bytes:
        """A part of a shard, from where it is remotely."""
        return self._remote.read(name, start, start + size)

    def drop(self, name: str) -> None:
        """Removes a copy that is damaged."""
        log.warning("%s was damaged in the cache: it is copied again", self.path / name)
        (self.path / name).unlink(missing_ok=True)
        self._asked.discard(name)

    def _want(self, name: str) -> None:
        """Has a thread of this process copy a shard."""
        if name in self._asked or time.monotonic() < self._full_until:
            return
        if self._thread is None or not self._thread.is_alive():  # it does not go through a fork
            self._wanted, self._asked = SimpleQueue(), set()
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._asked.add(name)
        self._wanted.put(name)

    def _serve(self) -> None:
        while True:
            name = self._wanted.get()
            try:
                self._fetch(name, waits=False)
            except ValueError as error:
                log.warning("no copy in data.cache_dir: %s", error)
            self._asked.discard(name)

    def _fetch(self, name: str, waits: bool) -> bool:
        """Whether there is a copy of a shard now. Another process may be at it, which can be waited for."""
        if time.monotonic() < self._full_until:
            return False
        path, size = self.path / name, self._sizes[name]
        try:
            with _part(path, waits) as file:
                if file is None or path.is_file():
                    return path.is_file()
                if not self._reserve(file, size):
                    self._give_up(f"they hold the {self._limit / GIGABYTE:g} GB of data.cache_gb")
                    return False
                self._remote.copy(name, file)
                if file.tell() != size:
                    raise ValueError(f"{name} has {file.tell()} bytes there, not {size}")
                _publish(file, path)
                return True
        except OSError as error:
            self._give_up(str(error.strerror))
            return False

    def _give_up(self, why: str) -> None:
        if not self._full_until:
            log.warning(
                "no further shards into data.cache_dir %s for now, they are read remotely: %s",
                self._root,
                why,
            )
        self._full_until = time.monotonic() + FULL_SECONDS

    def _reserve(self, file: BinaryIO, size: int) -> bool:
        """Whether `size` bytes are within the limit; then they are the file's. OSError where the disk is full."""
        file.truncate(0)
        with _locked(self._root / LOCK):
            if not self._make_room(size, needs_idle=True):
                return False
            os.posix_fallocate(file.fileno(), 0, size)
            return True

    def _make_room(self, size: int, needs_idle: bool) -> bool:
        """Whether `size` bytes are within the limit; the least recently used shards give way. With the lock."""
        kept = sorted(_kept(self._root), key=lambda entry: entry[1].st_mtime)
        free = self._limit - size - sum(state.st_size for _, state in kept)
        for path, state in kept:
            if free >= 0:
                break
            is_idle = path.parent != self.path and time.time() - state.st_mtime > IDLE_SECONDS
            if path.suffix != PART and (is_idle or not needs_idle):
                path.unlink(missing_ok=True)
                free += state.st_size
        return free >= 0

    def _tell(self, where: str) -> None:
        wanted = sum(self._sizes.values())
        if wanted <= self._limit or not distributed.is_rank_zero():
            return
        share = (
            f"{self._limit / wanted:.0%} of the {wanted / GIGABYTE:.1f} GB of {where} fit into data.cache_gb"
        )
        if self._remote.reads_parts:
            log.warning("%s: the rest is read remotely, sample by sample", share)
        else:
            log.warning("%s: for each sample of the rest its command is run, which is slow", share)

    def _bring(self, name: str, checksum: Any, where: str) -> None:
        """Copies a file of the set, unless it is here and whole."""
        path = self.path / name
        was_here = path.is_file()
        if was_here and checksum_of(path) == checksum:  # by all processes at once: an index may be large
            return
        with _part(path) as file:
            assert file is not None
            if path.is_file() and (not was_here or checksum_of(path) == checksum):
                return  # another process has just brought it
            file.truncate(0)
            self._remote.copy(name, file)
            file.flush()
            if checksum_of(_part_path(path)) != checksum:
                raise ValueError(
                    f"{where}: {name} does not belong to its {DATASET_FILE}: copy the set there again"
                )
            _publish(file, path)


def _kept(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Copies of shards, of any set, and parts of them that are being copied; other parts are removed."""
    for mark in root.glob(f"*/{MARK}"):
        for shard in _shards(mark.parent):
            path = mark.parent / f"{shard}.tar"
            part = _part_path(path)
            if part.is_file():
                with _part(path, waits=False):  # and who has the lock removes it
                    pass
            for one in (path, part):
                with contextlib.suppress(FileNotFoundError):
                    yield one, one.stat()


def _shards(folder: Path) -> list[str]:
    try:
        return [shard["name"] for shard in read_dataset_file(folder)["shards"]]
    except ValueError:  # of another version of this program
        return []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _part(path: Path, waits: bool = True) -> Iterator[BinaryIO | None]:
    """A file to copy into, which is removed again unless it is published.

    Another process may have it: that is waited for, or there is None.
    """
    part = _part_path(path)
    while True:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            if not _is_at(file, part):  # the other one has published or removed it
                continue
            try:
                yield file
            finally:
                if _is_at(file, part):
                    part.unlink()
            return


def _part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{PART}")


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _publish(file: BinaryIO, path: Path) -> None:
    """Gives a file that is whole its name."""
    file.flush()
    os.fsync(file.fileno())
    os.rename(_part_path(path), path)
