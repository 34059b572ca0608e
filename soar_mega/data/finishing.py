"""The end of a `prepare`: rejects of all shards are judged, then the sets get the files that make them finished."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soar_mega.data.info import DatasetInfo
from soar_mega.data.items import Reject
from soar_mega.data.json_files import read_json
from soar_mega.data.prepare_folder import HELD_OUT_FOLDER, index_file, remove_leftover_shards
from soar_mega.data.rejects import REJECTS_FILE, read_rejects, rejects_of, write_rejects
from soar_mega.data.shard_plan import Plan
from soar_mega.data.shard_writer import write_dataset_file

log = logging.getLogger(__name__)

SMALL, SMALL_SHARE = 64, 0.01  # a bucket with fewer samples than both, of all, is told of


@dataclass(kw_only=True)
class _Counts:
    """Of the samples of one set."""

    buckets: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    cut: Counter[str] = field(default_factory=Counter)  # captions, by text encoder

    def add(self, index: Mapping[str, Any]) -> None:
        """Those of one shard."""
        self.captions += sum(len(sample.get("captions", [None])) for sample in index["samples"])
        self.buckets.update(sample["bucket"] for sample in index["samples"])
        self.cut.update(index.get("captions_cut", {}))


def finish(
    folder: Path, plan: Plan, info: DatasetInfo, settings: Mapping[str, Any], skip_invalid: bool
) -> None:
    """Write the dataset files, that of the training set last.

    Args:
        info: of both sets, but for their buckets.
        settings: what the folder was begun with.

    Raises:
        ValueError: samples cannot be used, by name, and that is not allowed; or a set would hold none.
    """
    rejects, found = read_rejects(folder), list[Reject]()
    counts = {HELD_OUT_FOLDER: _Counts(), "": _Counts()}
    for shard in plan.shards:
        path = index_file(folder / shard.folder, shard.number)
        index = read_json(path)
        found += rejects_of(index, path)
        counts[shard.folder].add(index)
    if found:
        rejects += found
        write_rejects(folder, rejects, plan.source_samples, skip_invalid)
    for name, counted in counts.items():
        digests = [shard.digest for shard in plan.of(name)]
        if not digests:
            continue
        if not counted.buckets:
            raise ValueError(f"none of the samples can be used (see {folder / REJECTS_FILE})")
        remove_leftover_shards(folder / name, len(digests))
        write_dataset_file(
            folder / name,
            replace(info, buckets=dict(counted.buckets)),
            len(digests),
            settings=settings,
            digests=digests,
            rejected=len(rejects),
            captions_cut=dict(counted.cut),
        )
        _tell(folder / name, counted, len(digests), len(rejects))


def _tell(folder: Path, counted: _Counts, shards: int, rejected: int) -> None:
    samples = counted.buckets.total()
    for part, count in counted.cut.items():
        if count:
            log.warning(
                "%d of %d captions are longer than %s takes and were cut", count, counted.captions, part
            )
    small = [
        f"{bucket} ({n})" for bucket, n in counted.buckets.items() if n < min(SMALL, samples * SMALL_SHARE)
    ]
    if small:
        log.warning(
            "%s: few images are in the buckets %s: a batch may hold one of them several times. --min-bucket moves them "
            "to the nearest bucket that is left",
            folder,
            ", ".join(sorted(small)),
        )
    log.info("%s: %d samples in %d shards, %d left out", folder, samples, shards, rejected)
