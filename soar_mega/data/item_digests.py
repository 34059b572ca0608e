"""Whether the items of a shard are still those that it was made of."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from soar_mega.data.image_sources import Item


def listing(chunk: Sequence[Item]) -> str:
    """Changes with the names, captions and file sizes of a shard's items."""
    rows = [[i.name, i.caption, i.bucket, i.mirrored, i.image.stat().st_size] for i in chunk]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def contents(chunk: Sequence[Item]) -> str:
    """Changes with the images themselves; reads all of them."""
    digest = hashlib.sha256()
    for item in chunk:
        with open(item.image, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def images_changed(chunk: Sequence[Item], index: Path, contents_then: str) -> bool:
    """Whether an image is another one than when a shard's index was written.

    They are read again only where one was changed or put there since, which its size need not tell.
    """
    written = index.stat().st_mtime_ns
    stats = [item.image.stat() for item in chunk]
    is_newer = any(max(stat.st_mtime_ns, stat.st_ctime_ns) >= written for stat in stats)
    return is_newer and contents(chunk) != contents_then
