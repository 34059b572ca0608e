"""Which items go into which shard: settled by the first process and written down for all."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar_mega.data.items import Item
from soar_mega.data.json_files import line_bytes, lines_of, read_json, write_bytes, write_json
from soar_mega.data.prepare_folder import HELD_OUT_FOLDER
from soar_mega.data.selection import Chosen

PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """A shard of one of the two sets."""

    folder: str  # below the folder that is prepared: "" or that of the held-out set
    number: int
    samples: int
    digest: str


@dataclass(kw_only=True)
class Plan:
    """All shards, and how many samples the source has. The items of each shard are in a file of their own."""

    folder: Path
    source_samples: int = 0
    shards: list[PlannedShard] = field(default_factory=list)
    _waiting: dict[str, list[Chosen]] = field(default_factory=dict)
    _numbers: Counter[str] = field(default_factory=Counter)

    def add(self, chosen: Iterable[Chosen], samples_per_shard: int) -> None:
        """Cut further items, as they come, into shards."""
        for one in chosen:
            folder = HELD_OUT_FOLDER if one.held_out else ""
            waiting = self._waiting.setdefault(folder, [])
            waiting.append(one)
            if len(waiting) == samples_per_shard:
                self._close_shard(folder)

    def finish(self) -> None:
        """Close the last shards, and write down what `read` reads."""
        for folder in list(self._waiting):
            self._close_shard(folder)
        values = {"source_samples": self.source_samples, "shards": [vars(shard) for shard in self.shards]}
        write_json(self.folder / PLAN_FILE, values)

    @staticmethod
    def read(folder: Path) -> "Plan":
        values = read_json(folder / PLAN_FILE)
        shards = [PlannedShard(**shard) for shard in values["shards"]]
        return Plan(folder=folder, source_samples=values["source_samples"], shards=shards)

    def of(self, folder: str) -> list[PlannedShard]:
        """The shards of one of the two sets, by their numbers."""
        return [shard for shard in self.shards if shard.folder == folder]

    def items(self, shard: PlannedShard) -> list[Chosen]:
        """What goes into a shard."""
        rows = lines_of(self._file(shard.folder, shard.number).read_bytes())
        held_out = shard.folder == HELD_OUT_FOLDER
        return [Chosen(item=Item.from_row(row), sha256=sha256, held_out=held_out) for sha256, row in rows]

    def remove(self) -> None:
        for path in self.folder.glob("*.plan"):
            path.unlink()
        (self.folder / PLAN_FILE).unlink()

    def _close_shard(self, folder: str) -> None:
        chosen = self._waiting.pop(folder)
        number = self._numbers[folder]
        self._numbers[folder] += 1
        rows = ([one.sha256, one.item.to_row()] for one in chosen)
        write_bytes(self._file(folder, number), line_bytes(rows))
        shard = PlannedShard(folder=folder, number=number, samples=len(chosen), digest=_digest(chosen))
        self.shards.append(shard)

    def _file(self, folder: str, number: int) -> Path:
        return self.folder / f"{folder or 'training'}-{number:06d}.plan"


def _digest(chosen: Sequence[Chosen]) -> str:
    """Changes with the names, captions, buckets and contents of a shard's items."""

    def told(item: Item) -> list[Any]:
        captions = [[caption.text, caption.weight] for caption in item.captions]
        return [item.name, captions, item.bucket, item.mirrored]

    rows = [[*told(one.item), one.sha256] for one in chosen]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
