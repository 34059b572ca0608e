"""A folder of shards that is not a folder of this machine: behind a url that fsspec reads, or behind a command."""

import errno
import logging
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from soar_mega.data.fetched import PIPE, SHELL, is_remote
from soar_mega.data.info import DatasetInfo
from soar_mega.data.shard_writer import DATASET_FILE
from soar_mega.user_files import object_in, read_object

log = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes read at once
PAUSES = (1.0, 5.0, 20.0)  # seconds between attempts: a network fails for a moment
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of this machine
FILE = "{}"  # of a command: where the name of a file goes

T = TypeVar("T")


class RemoteFolder(Protocol):
    """Files by their names. What cannot be read, at several attempts, is a ValueError that names it."""

    reads_parts: bool  # whether a part of a file costs less than the file

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of a file from `start` to `end`, or to its own end."""

    def copy(self, name: str, file: BinaryIO) -> None:
        """Writes all of a file into `file`, from its beginning on; OSError where the disk is full."""


def remote_folder(path: str) -> RemoteFolder | None:
    """What is behind a path; None where it is a path of this machine."""
    if not is_remote(path):
        return None
    return CommandFolder(path) if path.startswith(PIPE) else UrlFolder(path)


def read_info(path: str) -> DatasetInfo:
    """What the shards behind a path are, also of this machine; ValueError where that cannot be read."""
    remote, file = remote_folder(path), Path(path, DATASET_FILE)
    values = read_object(file) if remote is None else object_in(remote.read(DATASET_FILE), file)
    return DatasetInfo.from_json(values, file)


class UrlFolder:
    """Behind a url, as s3://bucket/train."""

    reads_parts = True

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        def read() -> bytes:
            from fsspec.core import url_to_fs

            # anew each time: fsspec keeps one connection for each process, and none survives a fork
            files, path = url_to_fs(f"{self._url}/{name}")
            content: bytes = files.cat_file(path, start, end)
            _check_length(content, start, end)
            return content

        return _patiently(f"{self._url}/{name}", read)

    def copy(self, name: str, file: BinaryIO) -> None:
        def copy() -> None:
            import fsspec

            file.seek(0)
            with fsspec.open(f"{self._url}/{name}", "rb") as remote:
                shutil.copyfileobj(remote, file, BLOCK)

        _patiently(f"{self._url}/{name}", copy)


class CommandFolder:
    """Behind a command that writes a file to its output, as pipe:aws s3 cp s3://bucket/train/{} -"""

    reads_parts = False

    def __init__(self, path: str) -> None:
        self._command = path.removeprefix(PIPE)
        if FILE not in self._command:
            raise ValueError(
                f"data.path {path!r} names no file: write {FILE} where the name of a file goes, as in "
                f"'{PIPE}aws s3 cp s3://bucket/train/{FILE} -'"
            )

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        def read() -> bytes:
            with self._start(name) as process:
                assert process.stdout is not None
                to_pass = start
                while to_pass and (block := process.stdout.read(min(to_pass, BLOCK))):
                    to_pass -= len(block)
                content = process.stdout.read(-1 if end is None else end - start)
                if end is None or len(content) < end - start:
                    self._check(process)
                process.kill()
                _check_length(content, start, end)
                return content

        return _patiently(self._of(name), read)

    def copy(self, name: str, file: BinaryIO) -> None:
        def copy() -> None:
            file.seek(0)
            with self._start(name) as process:
                assert process.stdout is not None
                shutil.copyfileobj(process.stdout, file, BLOCK)
                self._check(process)

        _patiently(self._of(name), copy)

    def _of(self, name: str) -> str:
        return self._command.replace(FILE, shlex.quote(name))

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*SHELL, self._of(name)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        if code := process.wait():
            raise OSError(f"it ended with code {code}")


def _check_length(content: bytes, start: int, end: int | None) -> None:
    """OSError for an answer that broke off, or of a server that sends all of a file whatever part it is asked for."""
    if end is not None and len(content) != end - start:
        raise OSError(f"{len(content)} bytes came where {end - start} were asked for")


def _patiently(what: str, act: Callable[[], T]) -> T:
    """What `act` gives, at one of several attempts; ValueError naming `what` after the last."""
    for pause in (*PAUSES, None):
        try:
            return act()
        except FileNotFoundError as error:
            raise ValueError(f"{what} is not there") from error
        except ImportError as error:  # of the package for this kind of url
            raise ValueError(f"{what} cannot be read: {error}") from error
        except Exception as error:  # each kind of url has errors of its own
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            if pause is None:
                raise ValueError(f"{what} cannot be read: {error!r}") from error
            log.warning("%s: %r; it is tried again", what, error)
            time.sleep(pause)
    raise AssertionError
