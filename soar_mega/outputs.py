"""What is written where a user said: nothing there is removed or overwritten that this program did not write.

A folder that is written as a whole, such as a diffusers pipeline, holds a marker that says which files this program
wrote, with sizes and times. It is replaced as long as it holds nothing else. The new one is made beside it and takes
its place when it is complete:

    .out.soar_mega-new     is being written, or has been replaced and is being removed
    .out.soar_mega-old     waits to be replaced, on file systems where two names cannot be exchanged

Whoever writes next goes on from whatever a killed process left of these. A file holds its mark in its content.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

MARKER = ".soar_mega.json"
NAMED = 3  # files in a message
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def refuse_overlap(out: str | Path, inputs: Mapping[str, str | Path]) -> None:
    """ValueError where an output contains, equals or lies within an input; links are followed.

    Args:
        inputs: by what the message calls them; "" is no path.
    """
    real = _real(out)
    for name, path in inputs.items():
        if not path:
            continue
        other = _real(path)
        how = "is" if real == other else "lies in" if other in real.parents else "contains"
        if real == other or other in real.parents or real in other.parents:
            raise ValueError(f"{out} {how} {name} ({path}), which is read: write to another place")


class OutputFolder:
    """A folder that is written as a whole, by one process.

    Every method raises ValueError where the folder holds what this program did not write, or another process is writing
    it, and OSError where it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _real(path)
        self.new = _beside(self.path, "new")  # to write into, between `begin` and `publish`
        self._old = _beside(self.path, "old")
        self._lock: int | None = None  # of the process that writes: it goes away with it

    def check(self) -> None:
        """Does what writing begins with, and takes it back: so it will not fail for that later."""
        self.begin()
        self.give_up()

    def begin(self) -> None:
        """Makes `new`, empty."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        refuse_foreign(self.path)
        self.new.mkdir()
        self._lock = os.open(self.new, os.O_RDONLY)
        _try_lock(self._lock, self.path)
        (self.new / MARKER).touch()

    def publish(self) -> None:
        """Puts what has been written in the place of what was there."""
        _seal(self.new)
        refuse_foreign(self.path)
        if not self.path.exists() or not any(self.path.iterdir()):
            os.rename(self.new, self.path)
        elif not _exchange(self.new, self.path):
            os.rename(self.path, self._old)
            os.rename(self.new, self.path)
        sync(self.path.parent)
        self.give_up()

    def give_up(self) -> None:
        """Removes what is not, or no longer, in the folder's place; nothing in a process that is not writing."""
        if self._lock is not None:
            self._clear()
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Where to write what is to be in this place when all is done."""
        try:
            self.begin()
            yield self.new
            self.publish()
        finally:
            self.give_up()

    def _recover(self) -> None:
        """Finishes or takes back what a killed process began."""
        for folder in (self.new, self._old):
            _refuse_unless_left_over(folder, self.path)
        if self._old.exists() and not self.path.exists():
            os.rename(self._old, self.path)
        self._clear()

    def _clear(self) -> None:
        for folder in (self.new, self._old):
            if folder.exists():
                _remove(folder)


def refuse_foreign(folder: Path) -> None:
    """ValueError unless a folder is not there, or empty, or holds nothing but what this program wrote into it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the name of a folder")
    foreign = sorted(_foreign(folder))
    if not foreign:
        _refuse_protected(folder)
        return
    listed = ", ".join(foreign[:NAMED]) + (
        f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
    )
    raise ValueError(
        f"{folder} holds what this program did not write, or what was changed since: {listed}. It stays as it is: give "
        "another folder, or move this one away"
    )


def _refuse_protected(folder: Path) -> None:
    for parent, _, _ in os.walk(folder):
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"{parent} is protected against writing (chmod u+w)")


def check_file(path: str | Path, mark: bytes) -> None:
    """Tries whether a file can be written, without doing so; its folder is made.

    Args:
        mark: what the content of such a file holds when this program wrote it.

    Raises:
        ValueError: there is a folder, or a file without the mark.
        OSError: it cannot be written.
    """
    real = _real(path)
    if real.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if real.exists() and not _holds(real, mark):
        raise ValueError(f"{path} was not written by this program: give another name, or move it away")
    real.parent.mkdir(parents=True, exist_ok=True)
    trial = _new_file(real)
    trial.touch()
    trial.unlink()


def write_file(path: str | Path, content: bytes, mark: bytes) -> None:
    """Writes a file that `check_file` has been asked about, or replaces it as a whole; raises what that one does."""
    assert mark in content
    with in_place_of(path, mark) as new:
        new.write_bytes(content)


@contextlib.contextmanager
def in_place_of(path: str | Path, mark: bytes) -> Iterator[Path]:
    """Where to write what is to be a file when all is done, with the mark in it; raises what `check_file` does."""
    check_file(path, mark)
    real = _real(path)
    new = _new_file(real)
    try:
        yield new
        os.replace(new, real)
    finally:
        new.unlink(missing_ok=True)


def remove_left_over_files(folder: Path) -> None:
    """Removes what killed processes began to write as files of a folder; nobody may be writing there."""
    for path in folder.glob(_beside(Path("*"), "new-*").name):
        path.unlink()


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(file: Path, mark: bytes) -> bool:
    if not file.is_file() or file.stat().st_size == 0:
        return False
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark) >= 0


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.soar_mega-{what}")


def _new_file(path: Path) -> Path:
    """What a file is written as. If it is there, a killed process left it: in containers the numbers come again."""
    return _beside(path, f"new-{socket.gethostname()}-{os.getpid()}")


def _files(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Everything in a folder but folders and the marker: its name, and its size and time in ns."""
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in (*names, *(each for each in folders if os.path.islink(os.path.join(parent, each)))):
            file = Path(parent, name)
            facts = file.lstat()
            if file != folder / MARKER:
                yield file.relative_to(folder).as_posix(), [facts.st_size, facts.st_mtime_ns]


def _raise(error: OSError) -> None:
    raise error


def _foreign(folder: Path) -> list[str]:
    """What is in a folder and not in its marker."""
    written: dict[str, list[int]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no marker, or not one of ours
        written = dict(json.loads((folder / MARKER).read_text())["files"])
    return [name for name, facts in _files(folder) if written.get(name) != facts]


def _seal(folder: Path) -> None:
    """Makes a folder durable, and its marker say what is in it."""
    written = dict(_files(folder))
    for name in written:
        sync(folder / name)
    said = {"about": "what soar-mega wrote here: name, size, time in ns", "files": written}
    (folder / MARKER).write_text(json.dumps(said, indent=1) + "\n")
    for parent, _, _ in os.walk(folder):
        sync(Path(parent))
    sync(folder / MARKER)


def _remove(folder: Path) -> None:
    """The marker goes last: a folder that is half removed is still known as ours."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            if Path(parent, name) != folder / MARKER:
                os.unlink(os.path.join(parent, name))
        for name in folders:
            inner = os.path.join(parent, name)
            os.unlink(inner) if os.path.islink(inner) else os.rmdir(inner)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _refuse_unless_left_over(folder: Path, path: Path) -> None:
    if not os.path.lexists(folder):
        return
    ours = folder.is_dir() and not folder.is_symlink()
    if not ours or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
        raise ValueError(f"{folder} is in the way of {path}, and this program did not write it: move it away")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _try_lock(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems have no locks on folders
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing this folder; wait for it") from None


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
