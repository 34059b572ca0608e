"""Lists of images and captions: JSONL and CSV, as Hugging Face, diffusers and SOAR's authors write them."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soar_mega.data.captions import read_captions
from soar_mega.data.images import Picture
from soar_mega.data.info import bucket_name
from soar_mega.data.items import Item, Reject
from soar_mega.data.text_files import NO_TEXT, decode
from soar_mega.user_files import is_text

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption", "prompt", "captions")  # the first that a row has
PUBLISHED_KEY = "caption_en"  # of the published lists, and of what was made of them
NAME_KEYS = {"file_name", "md5"}  # what says which image a row is of
KIND = "line of a list"
SHOWN = 60  # characters in a message of what may be very long


def list_rows(path: Path, images: Path, score_key: str) -> Iterator[Item | Reject]:
    """What a .jsonl or .csv file lists of the images in a folder; a reject is named by its line."""
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            yield _item(row, images, score_key)
        except ValueError as error:
            yield Reject(name=f"{path.name}:{number}", reason=str(error), kind=KIND)


def score_of(row: dict[str, Any], key: str) -> float | None:
    """The score that a row gives its image; None where it gives none, or no number."""
    try:
        score = float(row[key])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def json_object(text: str) -> dict[str, Any]:
    """ValueError when a text is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = decode(line)
                if text.strip():
                    yield number, json_object(text)
            except ValueError as error:
                yield number, error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    try:
        text = decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    # as lines of a file: splitlines would end a caption at separators that Unicode has beside these
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or ()
    except csv.Error as error:
        raise ValueError(f"{path}: its first line is not valid CSV: {error}") from error
    if columns and NAME_KEYS.isdisjoint(columns):
        raise ValueError(
            f"{path}: its first line, {_shortened(','.join(columns))!r}, names no column file_name: name the columns "
            "there, with commas between them, as in file_name,text"
        )
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.reader.line_num, ValueError(f"is not valid CSV: {error}")
            continue
        if any(row.get(None, ())):  # what is behind the last column
            why = f"has more than {len(columns)} columns: a text with commas stands in double quotes"
            yield reader.line_num, ValueError(why)
        else:
            yield reader.line_num, row


def _item(row: dict[str, Any], images: Path, score_key: str) -> Item:
    if "md5" in row:
        name, caption_key = f"{row['md5']}.jpg", PUBLISHED_KEY
        bucket = bucket_name(_pixels(row, "bw"), _pixels(row, "bh"))
    elif "file_name" in row:
        name, bucket = str(row["file_name"]), None
        caption_key = next((key for key in CAPTION_KEYS if key in row), CAPTION_KEYS[0])
    else:
        raise ValueError("has neither md5 nor file_name")
    try:
        captions = read_captions(row, caption_key)
    except ValueError as error:
        raise ValueError(f"{_shortened(name)}: {error}") from error
    path = _inside(images, name)
    try:
        there = path.is_file()
    except OSError as error:  # no file can have such a name
        raise ValueError(f"image {_shortened(name)} cannot be opened: {error.strerror}") from error
    if not there:
        raise ValueError(f"image {path} is missing")
    return Item(
        name=name,
        image=Picture(path),
        captions=captions,
        bucket=bucket,
        score=score_of(row, score_key),
    )


def _inside(images: Path, name: str) -> Path:
    """A list may come from elsewhere: it names nothing but what is in the folder of its images."""
    if not is_text(name):
        raise ValueError(f"its file_name {NO_TEXT}")
    path = Path(os.path.normpath(images / name))
    if not path.is_relative_to(os.path.normpath(images)):
        raise ValueError(
            f"image {_shortened(name)} is not in {images}: --images names the folder that all are in"
        )
    return images / name


def _pixels(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    if type(value) is not int or value <= 0:  # true is an int too
        raise ValueError(f"{row['md5']}: {key} is {value!r}, a width or height in pixels is expected")
    return value


def _shortened(name: str) -> str:
    return name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
