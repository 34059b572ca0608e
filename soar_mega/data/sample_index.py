"""The index of a whole shard set in one file that is mapped into memory: a rank opens it without reading it.

The indices of the shards (JSON, one beside each tar) say the same, and the file can always be made of them:

    one line of JSON     how many samples there are, and how many of each bucket
    records              per sample: bucket, the end of its words, offset, size and CRC-32 of each part
    members              sample numbers, bucket after bucket
    words                per sample its key and, behind a zero byte, its name in the source; where it has several
                         captions these stand behind the key: weight, offset, size and CRC-32 of each
"""

import json
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX_FILE = "index.bin"
PLACE = [("offset", "<i8"), ("size", "<i8"), ("checksum", "<u4")]
RECORD = np.dtype([("latents", PLACE), ("text", PLACE), ("words_end", "<i8"), ("bucket", "<u4")])
MEMBER = np.dtype("<u4")
CAPTIONS = "\x1f"  # between a key and its captions

PartPlace = tuple[int, int, int]  # of a part of a sample in its tar: offset, size and CRC-32


class SampleIndex:
    """The samples of a shard set by number, in the order of the source.

    Args:
        content: what `index_content` made, or a map of a file that holds it.
    """

    def __init__(self, content: bytes | mmap.mmap) -> None:
        header_end = content.find(b"\n") + 1
        header = json.loads(content[:header_end])
        count: int = header["samples"]
        self.buckets: dict[str, int] = header["buckets"]
        self._bucket_names = list(self.buckets)
        self._content = content
        members_start = header_end + count * RECORD.itemsize
        self._records = np.frombuffer(content, RECORD, count, header_end)
        self._members = np.frombuffer(content, MEMBER, count, members_start)
        self._words_start = members_start + count * MEMBER.itemsize

    def __len__(self) -> int:
        return len(self._records)

    def bucket_of(self, sample: int) -> str:
        return self._bucket_names[self._records["bucket"][sample]]

    def members(self, bucket: str) -> NDArray[np.uint32]:
        """The samples of a bucket, in the order of the source."""
        ends = dict(zip(self.buckets, np.cumsum(list(self.buckets.values())).tolist(), strict=True))
        return self._members[ends[bucket] - self.buckets[bucket] : ends[bucket]]

    def key_and_name(self, sample: int) -> tuple[str, str]:
        """The key in the shard and the name in the source."""
        head, name = self._words(sample)
        return head.partition(CAPTIONS)[0], name

    def captions(self, sample: int) -> list[tuple[float, PartPlace]]:
        """Weight and place of each text of a sample with several; of one with one alone nothing."""
        listed = self._words(sample)[0].partition(CAPTIONS)[2]
        return [(weight, (offset, size, crc)) for weight, offset, size, crc in json.loads(listed or "[]")]

    def place(self, part: str, sample: int) -> PartPlace:
        """Of the "latents" or the "text" of a sample in its tar."""
        offset, size, checksum = self._records[part][sample].tolist()
        return offset, size, checksum

    def _words(self, sample: int) -> tuple[str, str]:
        ends = self._records["words_end"]
        start = self._words_start + (int(ends[sample - 1]) if sample else 0)
        head, _, name = self._content[start : self._words_start + int(ends[sample])].decode().partition("\0")
        return head, name


def index_content(shards: Iterable[list[dict[str, Any]]]) -> bytes:
    """The bytes of the file, from the samples of each shard's JSON in turn."""
    buckets: dict[str, int] = {}
    records, words = [], bytearray()
    for samples in shards:
        rows = np.zeros(len(samples), RECORD)
        for row, sample in zip(rows, samples, strict=True):
            several = f"{CAPTIONS}{json.dumps(sample['captions'])}" if "captions" in sample else ""
            words += f"{sample['key']}{several}\0{sample['name']}".encode(errors="replace")
            buckets.setdefault(sample["bucket"], len(buckets))
            row["words_end"], row["bucket"] = len(words), buckets[sample["bucket"]]
            for part in ("latents", "text"):
                row[part] = tuple(sample[part])
        records.append(rows)
    return join(list(buckets), np.concatenate(records) if records else np.zeros(0, RECORD), bytes(words))


def join(buckets: list[str], records: NDArray[Any], words: bytes) -> bytes:
    """The bytes of the file, from one record per sample."""
    counts = np.bincount(records["bucket"], minlength=len(buckets)).tolist()
    header = {"samples": len(records), "buckets": dict(zip(buckets, counts, strict=True))}
    members = np.argsort(records["bucket"], kind="stable").astype(MEMBER)
    return b"".join((json.dumps(header).encode() + b"\n", records.tobytes(), members.tobytes(), words))
