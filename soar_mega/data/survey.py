"""What must be known of every image before the first is encoded: its content's SHA-256 and its size in pixels.

The listed items are cut into parts, a file each. A part that is there is taken as it is while no image of it has
changed, so a `prepare` that is started again reads no image twice for this.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from soar_mega.data.images import ImageError, Picture, image_size
from soar_mega.data.items import Item
from soar_mega.data.json_files import line_bytes, lines_of, write_bytes
from soar_mega.data.threads import in_order

PART = 1000  # items


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of an image: `problem`, or its size."""

    sha256: str = ""  # of the content, where that could be read
    width: int = 0
    height: int = 0
    problem: str = ""


class Survey:
    """The list of all items and what was seen of their images, as files in a folder that all processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write_list(self, items: Sequence[Item]) -> int:
        """Write down what is to be looked at: in how many parts."""
        self._folder.mkdir(exist_ok=True)
        parts = range(0, len(items), PART)
        for part, first in enumerate(parts):
            rows = (item.to_row() for item in items[first : first + PART])
            write_bytes(self._list(part), line_bytes(rows))
        for path in self._folder.iterdir():  # of a longer list
            if path.stem.isdecimal() and int(path.stem) >= len(parts):
                path.unlink()
        return len(parts)

    def remove_list(self) -> None:
        """What was seen stays."""
        for path in self._folder.glob("*.list"):
            path.unlink()

    def look(self, part: int, threads: int) -> None:
        """Look at the images of a part, unless that was done before and none has changed since."""
        items = self.items(part)
        state = _state(items, threads)
        if self._known(part, state):
            return
        seen = list(in_order(threads, _look, [item.image for item in items]))
        if not all(one.sha256 for one in seen):
            # a file that a disk or a network did not give may be read next time, with the same times
            state = ""
        body = line_bytes([one.sha256, one.width, one.height, one.problem] for one in seen)
        write_bytes(self._seen(part), f"{state} {zlib.crc32(body)}\n".encode() + body)

    def items(self, part: int) -> list[Item]:
        """The items of a part, as they were written down."""
        return [Item.from_row(row) for row in lines_of(self._list(part).read_bytes())]

    def seen(self, part: int) -> list[Seen]:
        """What was seen of the items of a part."""
        _, _, body = self._seen(part).read_bytes().partition(b"\n")
        return [Seen(sha256=s, width=w, height=h, problem=p) for s, w, h, p in lines_of(body)]

    def _known(self, part: int, state: str) -> bool:
        try:
            head, _, body = self._seen(part).read_bytes().partition(b"\n")
        except OSError:
            return False
        return head == f"{state} {zlib.crc32(body)}".encode()

    def _list(self, part: int) -> Path:
        return self._folder / f"{part:06d}.list"

    def _seen(self, part: int) -> Path:
        return self._folder / f"{part:06d}.seen"


def _state(items: Sequence[Item], threads: int) -> str:
    """Changes with every change of an image file, also one by another of the same size and times of writing."""

    @cache
    def stat(path: Path) -> list[int]:
        try:
            found = path.stat()
        except OSError:
            return []
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    stats = in_order(threads, stat, [item.image.path for item in items])
    places = [[str(i.image.path), i.image.offset, i.image.size] for i in items]
    return hashlib.sha256(json.dumps([places, list(stats)]).encode()).hexdigest()


def _look(picture: Picture) -> Seen:
    try:
        with picture.open() as file:
            content = file.read()
    except ImageError as error:
        return Seen(problem=str(error))
    except OSError as error:
        return Seen(problem=f"cannot be read: {error.strerror}")
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        width, height = image_size(BytesIO(content))
    except ImageError as error:
        return Seen(sha256=sha256, problem=str(error))
    return Seen(sha256=sha256, width=width, height=height)
