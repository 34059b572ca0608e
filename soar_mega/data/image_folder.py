"""What lies in a folder of captioned images: everything below it is seen, and what is passed over is told."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".jxl", ".jp2", ".heic", ".heif", ".svg",
                  ".psd", ".tga", ".dng", ".cr2", ".nef", ".arw")  # fmt: skip
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # of a NAS and of macOS; the others' names begin with a dot

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Folder:
    """The files below a folder, each list in the order of their names.

    Attributes:
        others: pictures of kinds that are not taken.
        problems: what cannot be seen, and why: a folder that cannot be listed, a link that leads nowhere.
    """

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def walk(folder: Path) -> Folder:
    """All files below a folder and below the folders that links in it lead to.

    Left out, and told in the log: what other programs keep beside images (hidden files and folders, @eaDir, __MACOSX)
    and links to a folder around them.
    """
    found = Folder()
    hidden: list[Path] = []
    for path in _files(folder, found, hidden):
        suffix = path.suffix.lower()
        if not os.path.isfile(path):
            told = (
                f"is a link to {os.readlink(path)}, which is missing"
                if path.is_symlink()
                else "is not a file"
            )
            found.problems.append((path, told))
        elif suffix in IMAGE_SUFFIXES:
            found.images.append(path)
        elif path.suffix == ".txt":
            found.captions.append(path)
        elif suffix in OTHER_SUFFIXES:
            found.others.append(path)
    for files in (found.images, found.captions, found.others, found.problems):
        files.sort()
    if hidden:
        log.info(
            "%s: %d hidden files and folders are passed over, such as %s", folder, len(hidden), min(hidden)
        )
    return found


def _files(folder: Path, found: Folder, hidden: list[Path]) -> Iterator[Path]:
    def cannot_be_listed(error: OSError) -> None:
        found.problems.append((Path(error.filename), f"cannot be listed: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=cannot_be_listed, followlinks=True):
        here = Path(parent)
        hidden += [here / name for name in (*folders, *names) if _is_hidden(name)]
        folders[:] = [name for name in folders if not _is_hidden(name) and not _is_loop(here / name)]
        yield from (here / name for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _is_loop(folder: Path) -> bool:
    if not folder.is_symlink():
        return False
    if os.path.realpath(folder) not in {os.path.realpath(around) for around in folder.parents}:
        return False
    log.warning("%s is a link to a folder around it: it is not followed", folder)
    return True
