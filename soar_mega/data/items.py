"""One captioned image of a source, or what is left out of it and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.captions import Caption
from soar_mega.data.images import Picture

UNREADABLE = "picture cannot be read"  # a kind of reject


@dataclass(frozen=True, kw_only=True)
class Item:
    """One captioned image."""

    name: str  # unique enough to be found again in the source
    image: Picture
    captions: tuple[Caption, ...]  # at least one
    bucket: str | None = None  # given by the source; None: the one nearest to the image's own shape
    score: float | None = None  # given by the source
    mirrored: bool = False

    def to_row(self) -> list[Any]:
        place = [str(self.image.path), self.image.offset, self.image.size]
        captions = [[caption.text, caption.weight] for caption in self.captions]
        return [self.name, place, captions, self.bucket, self.score, self.mirrored]

    @staticmethod
    def from_row(row: list[Any]) -> "Item":
        name, (path, offset, size), captions, bucket, score, mirrored = row
        return Item(
            name=name,
            image=Picture(Path(path), offset, size),
            captions=tuple(Caption(text, weight) for text, weight in captions),
            bucket=bucket,
            score=score,
            mirrored=mirrored,
        )


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A sample that is left out.

    Attributes:
        kind: a few words that it shares with others, for a table.
        by_choice: a filter was asked to leave it out; nothing is wrong with it.
    """

    name: str
    reason: str
    kind: str
    by_choice: bool = False
