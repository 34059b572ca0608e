"""Captioned images in tars as webdataset and img2dataset write them. They are read in place: nothing is unpacked, so no
name in a tar leads anywhere, and what is neither an image nor text is passed over unread."""

import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from soar_mega.data.caption_lists import CAPTION_KEYS, PUBLISHED_KEY, json_object, score_of
from soar_mega.data.captions import Caption, read_captions
from soar_mega.data.images import Picture
from soar_mega.data.items import Item, Reject
from soar_mega.data.picture_kinds import IMAGE_SUFFIXES
from soar_mega.data.text_files import decode

CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # the first that a sample has, and whose text is not empty
LARGEST_TEXT = 2**20  # bytes

log = logging.getLogger(__name__)


def list_tar(path: Path, label: str, score_key: str) -> Iterator[Item | Reject]:
    """The samples of a tar. The members KEY.jpg, KEY.txt and KEY.json are one sample.

    Args:
        label: what the names of samples begin with.
    """
    pictures: dict[str, list[tuple[str, Picture]]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    links: list[str] = []  # also those that tar makes of a file that is in it by two names
    further: list[tuple[str, str]] = []  # as KEY.mask.png
    passed_over = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # the library would keep all
                key, suffix = _key(member.name)
                if not member.isreg() or member.issparse():
                    if suffix in IMAGE_SUFFIXES:
                        links.append(member.name)
                    continue
                if suffix in IMAGE_SUFFIXES:
                    picture = Picture(path, member.offset_data, member.size)
                    pictures.setdefault(key, []).append((suffix, picture))
                elif suffix in CAPTION_SUFFIXES and member.size <= LARGEST_TEXT:
                    file = tar.extractfile(member)
                    assert file is not None
                    texts.setdefault(key, {})[suffix] = file.read()
                else:
                    passed_over += 1
                    if suffix.endswith(IMAGE_SUFFIXES) and key != member.name:
                        further.append((key, member.name))
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        yield Reject(name=label, reason=f"cannot be read as an uncompressed tar: {error}", kind="damaged tar")
    if passed_over:
        log.info("%s: %d members are neither images nor captions and are passed over", path, passed_over)
    for member_name in links:
        reason = "is a link or no plain file: pack the picture itself (tar --hard-dereference)"
        yield Reject(name=f"{label}/{member_name}", reason=reason, kind="link in a tar")
    for key, member_name in further:
        if key not in pictures:
            reason = "is a picture with a dot in its name, where that of a sample ends: name it without"
            yield Reject(name=f"{label}/{member_name}", reason=reason, kind="dot in a name")
    for key, found in pictures.items():
        name = f"{label}/{key}"
        if len(found) > 1:
            reason = f"has the pictures {' and '.join(suffix for suffix, _ in found)}: leave one of them"
            yield Reject(name=name, reason=reason, kind="several pictures")
            continue
        [(_, picture)] = found
        try:
            captions, score = _captions(texts.get(key, {}), score_key)
        except ValueError as error:
            yield Reject(name=name, reason=str(error), kind="no caption")
        else:
            yield Item(name=name, image=picture, captions=captions, score=score)
    for key in sorted(texts.keys() - pictures.keys()):
        yield Reject(
            name=f"{label}/{key}", reason="is a caption without an image", kind="caption without an image"
        )


def _check_end(path: Path, end: int) -> None:
    """ValueError where a tar is not over behind its last member: the library stops at whatever is no member."""
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise ValueError(f"it breaks off at byte {end}: copy it again")
        while block:
            if block.strip(b"\0"):
                raise ValueError(
                    f"behind byte {end} there is more, which cannot be read: copy it again, or take tars apart that "
                    "were joined"
                )
            block = file.read(tarfile.RECORDSIZE)


def _key(name: str) -> tuple[str, str]:
    """Of a member, as webdataset splits it: at the first dot of its last part."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, (dot + suffix).lower()


def _captions(texts: dict[str, bytes], score_key: str) -> tuple[tuple[Caption, ...], float | None]:
    """(captions, score). ValueError where there is no caption."""
    row = json_object(decode(texts[".json"])) if ".json" in texts else {}
    plain = next((decode(texts[s]) for s in (".txt", ".caption") if texts.get(s, b"").strip()), None)
    if plain:
        return (Caption(plain.strip()),), score_of(row, score_key)
    key = next((key for key in (*CAPTION_KEYS, PUBLISHED_KEY) if row.get(key)), None)
    if key is None:
        raise ValueError("has no caption: no .txt, no .caption and no caption in its .json")
    return read_captions(row, key), score_of(row, score_key)
