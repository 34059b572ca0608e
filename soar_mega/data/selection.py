"""Which of the images are encoded, into which of the two sets, and in which bucket."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from soar_mega.data.buckets import bucket_problem, nearest_bucket, shape
from soar_mega.data.encoder_facts import EncoderFacts
from soar_mega.data.items import UNREADABLE, Item, Reject
from soar_mega.data.survey import Seen

HASH_SPACE = 2**64


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user asks of the images; None asks nothing.

    Attributes:
        min_side: pixels of the smaller side.
        aspect: the longer side by the smaller one, at most.
        min_score: of the score that the source gives.
        drop_duplicates: take the first only of images with the same content.
        held_out_share: of the contents, for the held-out set.
        flip: take each image of the training set mirrored too.
    """

    min_side: int | None = None
    aspect: float | None = None
    min_score: float | None = None
    drop_duplicates: bool = False
    held_out_share: float | None = None
    flip: bool = False

    def check(self) -> None:
        """ValueError naming a wish that no image can fulfil."""
        if self.min_side is not None and self.min_side < 1:
            raise ValueError(f"min_side is {self.min_side}: it must be at least 1 pixel")
        if self.aspect is not None and not self.aspect >= 1:
            raise ValueError(f"aspect is {self.aspect}: the longer side by the smaller one is at least 1")
        if self.held_out_share is not None and not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}: it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An item that is encoded: its bucket is settled, its content known."""

    item: Item
    sha256: str
    held_out: bool


class Selection:
    """Goes through all items once, in the order of the source.

    Attributes:
        rejects: what was left out so far, and why.
        duplicates: (name, name of the first with the same content).
    """

    def __init__(self, wishes: Wishes, buckets: Sequence[str], facts: EncoderFacts) -> None:
        self.rejects: list[Reject] = []
        self.duplicates: list[tuple[str, str]] = []
        self._wishes = wishes
        self._buckets = buckets
        self._facts = facts
        self._first: dict[bytes, str] = {}  # content -> name

    def choose(self, items: Iterable[tuple[Item, Seen]]) -> Iterator[Chosen]:
        """Those of further items that are encoded, and the mirrored ones."""
        for item, seen in items:
            bucket = item.bucket
            if bucket is None and not seen.problem:
                bucket = nearest_bucket(seen.width, seen.height, self._buckets)
            item = replace(item, bucket=bucket)
            reject = self._damage(item, seen) or self._filtered(item, seen) or self._repeated(item, seen)
            if reject is not None:
                self.rejects.append(reject)
                continue
            chosen = Chosen(item=item, sha256=seen.sha256, held_out=self._is_held_out(seen.sha256))
            yield chosen
            if self._wishes.flip and not chosen.held_out:
                mirrored = replace(item, name=f"{item.name} (mirrored)", mirrored=True)
                yield replace(chosen, item=mirrored)

    def shapes(self, items: Iterable[tuple[Item, Seen]]) -> Iterator[float]:
        """`buckets.shape` of those of further items that are trained on and bring no bucket of their own."""
        for item, seen in items:
            chosen = list(self.choose([(item, seen)]))
            if chosen and item.bucket is None and not chosen[0].held_out:
                yield shape(seen.width, seen.height)

    def _damage(self, item: Item, seen: Seen) -> Reject | None:
        if seen.problem:
            return Reject(name=item.name, reason=seen.problem, kind=UNREADABLE)
        assert item.bucket is not None
        if problem := bucket_problem(item.bucket, self._facts.size_multiple, self._facts.largest_side):
            return Reject(name=item.name, reason=problem, kind="bucket")
        if self._wishes.min_score is not None and item.score is None:
            return Reject(name=item.name, reason="the source gives it no score", kind="no score")
        return None

    def _filtered(self, item: Item, seen: Seen) -> Reject | None:
        wishes, smaller, longer = self._wishes, min(seen.width, seen.height), max(seen.width, seen.height)
        if wishes.min_side is not None and smaller < wishes.min_side:
            kind, reason = "too small", f"its smaller side is {smaller} pixels"
        elif wishes.aspect is not None and longer > wishes.aspect * smaller:
            kind, reason = "too long", f"is {seen.width} by {seen.height} pixels"
        elif wishes.min_score is not None and item.score is not None and item.score < wishes.min_score:
            kind, reason = "score too low", f"its score is {item.score:g}"
        else:
            return None
        return Reject(name=item.name, reason=reason, kind=kind, by_choice=True)

    def _repeated(self, item: Item, seen: Seen) -> Reject | None:
        content = bytes.fromhex(seen.sha256)
        if content not in self._first:
            self._first[content] = item.name
            return None
        first = self._first[content]
        self.duplicates.append((item.name, first))
        if not self._wishes.drop_duplicates:
            return None
        return Reject(name=item.name, reason=f"is the same file as {first}", kind="duplicate", by_choice=True)

    def _is_held_out(self, sha256: str) -> bool:
        share = self._wishes.held_out_share
        return share is not None and int(sha256[:16], 16) < share * HASH_SPACE
