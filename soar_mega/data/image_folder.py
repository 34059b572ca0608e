"""What lies in a folder of captioned images: everything below it is seen, and what is passed over is told."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from soar_mega.data.caption_lists import METADATA_FILES, list_rows
from soar_mega.data.captions import Caption
from soar_mega.data.images import Picture
from soar_mega.data.items import Item, Reject
from soar_mega.data.picture_kinds import IMAGE_SUFFIXES, OTHER_SUFFIXES
from soar_mega.data.sample_tars import list_tar
from soar_mega.data.text_files import decode

CAPTION_SUFFIXES = (".txt", ".caption")  # the first that an image has
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # of a NAS and of macOS; the others' names begin with a dot

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Folder:
    """The files below a folder, each list in the order of their names.

    Attributes:
        lists: files that list images, below the folder itself.
        others: pictures of kinds that are not taken.
        problems: what cannot be seen, and why: a folder that cannot be listed, a link that leads nowhere.
    """

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def list_folder(folder: Path, score_key: str) -> Iterator[Item | Reject]:
    """What a folder holds: the images that its metadata file lists, or else those with captions beside them; then the
    samples of its tars."""
    found = walk(folder)
    metadata = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(
            f"{folder} holds {' and '.join(METADATA_FILES)}: give the one that is meant as a source"
        )
    if metadata:
        yield from _listed(metadata[0], folder, found, score_key)
    else:
        if found.lists:
            log.warning(
                "%s lists images and is not read: give its folder as a source, as %s",
                found.lists[0],
                found.lists[0].parent,
            )
        yield from _captioned(folder, found)
    for tar in found.tars:
        yield from list_tar(tar, tar.relative_to(folder).as_posix(), score_key)


def _listed(metadata: Path, folder: Path, found: Folder, score_key: str) -> Iterator[Item | Reject]:
    """What a metadata file lists; pictures that it does not are told in the log."""
    listed = set()
    for result in list_rows(metadata, folder, score_key):
        if isinstance(result, Item):
            listed.add(result.image.path)
        yield result
    others = [image for image in found.images if image not in listed]
    if others:
        log.warning(
            "%s does not list %d pictures of its folder, such as %s", metadata, len(others), others[0]
        )


def _captioned(folder: Path, found: Folder) -> Iterator[Item | Reject]:
    captions = set(found.captions)
    twice = 0
    for image in found.images:
        name = image.relative_to(folder).as_posix()
        beside = [path for path in map(image.with_suffix, CAPTION_SUFFIXES) if path in captions]
        twice += len(beside) > 1
        try:
            caption = _caption(image, beside)
        except ValueError as error:
            yield Reject(name=name, reason=str(error), kind="no caption")
        else:
            yield Item(name=name, image=Picture(image), captions=(caption,))
    if twice:
        log.warning("%s: %d images have a .txt and a .caption; the .txt is taken", folder, twice)
    kinds = " ".join(IMAGE_SUFFIXES)
    for path, reason in found.problems:
        yield Reject(name=path.relative_to(folder).as_posix(), reason=reason, kind="cannot be seen")
    for path in found.others:
        reason = f"is a picture of another kind than {kinds}: convert or remove it"
        yield Reject(name=path.relative_to(folder).as_posix(), reason=reason, kind="another kind of picture")
    pictures = (*found.images, *(path for path, _ in found.problems), *found.others)
    captioned = {path.with_suffix(suffix) for path in pictures for suffix in CAPTION_SUFFIXES}
    for path in sorted(captions - captioned):
        name = path.relative_to(folder).as_posix()
        yield Reject(name=name, reason="is a caption without an image", kind="caption without an image")


def _caption(image: Path, beside: list[Path]) -> Caption:
    """The text of the first of the captions. ValueError where there is none."""
    if not beside:
        raise ValueError(f"has no caption: {image.with_suffix(CAPTION_SUFFIXES[0]).name} is missing")
    path = beside[0]
    try:
        text = decode(path.read_bytes()).strip()
    except OSError as error:
        raise ValueError(f"its caption {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"its caption {path.name} {error}") from error
    if not text:
        raise ValueError(f"its caption {path.name} is empty")
    return Caption(text)


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
        elif path.suffix in CAPTION_SUFFIXES:
            found.captions.append(path)
        elif path.suffix == ".tar":
            found.tars.append(path)
        elif path.name in METADATA_FILES and path.parent != folder:
            found.lists.append(path)
        elif suffix in OTHER_SUFFIXES:
            found.others.append(path)
    for files in (found.images, found.captions, found.tars, found.lists, found.others, found.problems):
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
