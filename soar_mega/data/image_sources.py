"""Lists of captioned images: an image folder, or a JSONL file as Hugging Face's or SOAR's authors write it."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.image_folder import IMAGE_SUFFIXES, walk
from soar_mega.data.info import bucket_name
from soar_mega.data.text_files import decode
from soar_mega.user_files import is_text

log = logging.getLogger(__name__)

METADATA_FILE = "metadata.jsonl"
SHOWN = 60  # characters of an impossible file name in a message


@dataclass(frozen=True, kw_only=True)
class Item:
    """One captioned image."""

    name: str  # unique enough to be found again in the source
    image: Path
    caption: str
    bucket: str | None = None  # given by the source; None: the one nearest to the image's own shape
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A sample that cannot be used."""

    name: str
    reason: str


class _Invalid(ValueError):
    """Why one sample of a list cannot be used."""


def list_items(source: Path, images: Path | None = None) -> tuple[list[Item], list[Reject]]:
    """Items of a source in a fixed order, and what is wrong with the others.

    Args:
        source: a folder of images with a NAME.txt beside each NAME.png (.jpg, ...) or with a metadata.jsonl (file_name,
            text); or a .jsonl file with either md5, caption_en, bw, bh (images named MD5.jpg) or file_name, text.
        images: the folder of the images of a .jsonl file; None: the folder that the file is in.

    Raises:
        ValueError: there is no such source, or it holds no image.
    """
    if source.is_dir():
        metadata = source / METADATA_FILE
        results = _listed_folder(metadata, source) if metadata.is_file() else _image_folder(source)
    elif source.is_file() and source.suffix == ".jsonl":
        results = _json_lines(source, images or source.parent)
    else:
        raise ValueError(f"{source} is neither an image folder nor a .jsonl file")
    found = list(results)
    if not found:
        kinds = " ".join(IMAGE_SUFFIXES)
        raise ValueError(
            f"{source} holds no images: images ({kinds}) with captions NAME.txt beside them are expected"
        )
    items = [item for item in found if isinstance(item, Item)]
    return items, [reject for reject in found if isinstance(reject, Reject)]


def _image_folder(folder: Path) -> Iterator[Item | Reject]:
    found = walk(folder)
    captions = set(found.captions)
    for image in found.images:
        name = image.relative_to(folder).as_posix()
        caption = image.with_suffix(".txt")
        if caption not in captions:
            yield Reject(name=name, reason=f"has no caption: {caption.name} is missing")
            continue
        try:
            text = decode(caption.read_bytes()).strip()
        except OSError as error:
            yield Reject(name=name, reason=f"its caption {caption.name} cannot be read: {error.strerror}")
        except ValueError as error:
            yield Reject(name=name, reason=f"its caption {caption.name} {error}")
        else:
            if text:
                yield Item(name=name, image=image, caption=text)
            else:
                yield Reject(name=name, reason=f"its caption {caption.name} is empty")
    kinds = " ".join(IMAGE_SUFFIXES)
    reasons = dict(found.problems)
    reasons |= dict.fromkeys(found.others, f"is a picture of another kind than {kinds}: convert or remove it")
    captioned = {picture.with_suffix(".txt") for picture in (*found.images, *reasons)}
    reasons |= dict.fromkeys(sorted(captions - captioned), "is a caption without an image")
    for path, reason in reasons.items():
        yield Reject(name=path.relative_to(folder).as_posix(), reason=reason)


def _listed_folder(metadata: Path, folder: Path) -> Iterator[Item | Reject]:
    """What metadata.jsonl lists; pictures that it does not are told in the log."""
    listed = set()
    for result in _json_lines(metadata, folder):
        if isinstance(result, Item):
            listed.add(result.image)
        yield result
    others = [image for image in walk(folder).images if image not in listed]
    if others:
        log.warning(
            "%s does not list %d pictures of its folder, such as %s", metadata, len(others), others[0]
        )


def _json_lines(path: Path, images: Path) -> Iterator[Item | Reject]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = decode(line)
                if text.strip():
                    yield _json_item(text, images)
            except ValueError as error:
                yield Reject(name=f"{path.name}:{number}", reason=str(error))


def _json_item(line: str, images: Path) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Invalid(f"is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise _Invalid("is not a JSON object")
    if "md5" in row:
        name, caption = f"{row['md5']}.jpg", row.get("caption_en")
        bucket = bucket_name(_pixels(row, "bw"), _pixels(row, "bh"))
    elif "file_name" in row:
        name, caption, bucket = str(row["file_name"]), row.get("text"), None
    else:
        raise _Invalid("has neither md5 nor file_name")
    if not isinstance(caption, str) or not caption.strip():
        raise _Invalid(f"{name} has no caption ({'caption_en' if bucket else 'text'} is missing or empty)")
    if not is_text(caption):
        raise _Invalid(
            f"the caption of {name} is no text: it holds half of a UTF-16 pair (\\ud800 to \\udfff)"
        )
    try:
        there = (images / name).is_file()
    except OSError as error:  # no file can have such a name
        raise _Invalid(f"image {_shortened(name)} cannot be opened: {error.strerror}") from error
    if not there:
        raise _Invalid(f"image {images / name} is missing")
    return Item(name=name, image=images / name, caption=caption.strip(), bucket=bucket)


def _pixels(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    if type(value) is not int or value <= 0:  # true is an int too
        raise _Invalid(f"{row['md5']}: {key} is {value!r}, a width or height in pixels is expected")
    return value


def _shortened(name: str) -> str:
    return name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
