"""Measures what feeding costs, one part of it at a time.

    python tools/bench_data.py index           a made-up set of 10 M samples: what it takes a rank to open it
    python tools/bench_data.py index --smoke

index: each measurement is of a process of its own. Seconds are wall clock, and of the processor in brackets; memory is
what the process has more than before: its own, and with the pages of the mapped index that it touched. The file was
just written, so it comes from memory, not from a disk. Writes JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import origin

from soar_mega.data.info import DatasetInfo
from soar_mega.data.made_up import write_made_up_shards
from soar_mega.data.order import Order, Place
from soar_mega.data.sample_index import INDEX_FILE, RECORD, join
from soar_mega.data.shard_writer import DATASET_FILE, shard_name, write_json
from soar_mega.data.shards import open_shards

Json = dict[str, Any]
SIZES = ["1024x1024", "896x1152", "1152x896", "768x1344", "1344x768"]
PER_SHARD = 1000
PART_BYTES = 1 << 19  # of a sample's latents, and of its text
KEY_BYTES, NAME_BYTES = 9, 32


def write_index_only(folder: Path, samples: int) -> None:
    """A set with everything that opening looks at: its shards have a size and no content."""
    info = DatasetInfo(
        buckets={SIZES[0]: 1},
        latent_channels=1,
        vae_scale_factor=256,
        text_shape=(1, 1),
        pooled_size=1,
        max_sequence_length=1,
        text_dtype="float32",
        encoders={},
    )
    write_made_up_shards(folder, info, seed=0)
    numbers = np.arange(samples)
    records = np.zeros(samples, RECORD)
    for place, part in enumerate(("latents", "text")):
        records[part]["offset"] = (numbers % PER_SHARD * 2 + place) * PART_BYTES
        records[part]["size"] = PART_BYTES
    length = KEY_BYTES + 1 + NAME_BYTES
    records["words_end"] = (numbers + 1) * length
    records["bucket"] = numbers * len(SIZES) // samples  # bucket after bucket
    index = join(SIZES, records, b"000000000\0photos/0123456789abcdef01234.jpg" * samples)
    (folder / INDEX_FILE).write_bytes(index)
    shards = []
    for number in range(samples // PER_SHARD):
        path = folder / f"{shard_name(number)}.tar"
        path.touch()
        os.truncate(path, 2 * PER_SHARD * PART_BYTES)
        shards.append({"name": path.stem, "samples": PER_SHARD, "bytes": 2 * PER_SHARD * PART_BYTES})
    counts = np.bincount(records["bucket"], minlength=len(SIZES)).tolist()
    values = json.loads((folder / DATASET_FILE).read_text())
    values |= {"buckets": dict(zip(SIZES, counts, strict=True)), "shards": shards}
    write_json(folder / DATASET_FILE, {**values, "index_crc32": zlib.crc32(index)})


def memory() -> dict[str, int]:
    """Megabytes of this process: its own, and with what it has mapped of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, all_of_it = (int(lines[key].split()[0]) // 1024 for key in ("RssAnon", "VmRSS"))
    return {"own_mb": own, "with_mapped_mb": all_of_it, "peak_mb": int(lines["VmHWM"].split()[0]) // 1024}


def opened(folder: Path) -> Json:
    """What it takes this process to open a set, and then to say which samples the first batch holds."""
    torch.set_num_threads(1)
    Order(0, {"1x1": 8}).members(Order(0, {"1x1": 8}).step(Place(), 4)[0])  # what is loaded at the first use
    before, marks = memory(), [(time.perf_counter(), time.process_time())]
    found: Json = {}
    shards = open_shards(folder)
    marks.append((time.perf_counter(), time.process_time()))
    found["open"] = _since(before, marks)
    order = Order(0, shards.info.buckets)
    stretch, _ = order.step(Place(), 256)
    shards.names(shards.members(stretch.bucket)[order.members(stretch)].tolist())
    marks.append((time.perf_counter(), time.process_time()))
    found["first_batch"] = _since(before, marks)
    return found


def _since(before: dict[str, int], marks: list[tuple[float, float]]) -> Json:
    seconds, cpu = (now - then for now, then in zip(marks[-1], marks[-2], strict=True))
    grown = {f"more_{key}": value - before[key] for key, value in memory().items()}
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), **grown}


def index_part(arguments: argparse.Namespace) -> Json:
    samples = 4 * PER_SHARD if arguments.smoke else arguments.samples
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "shards"
        write_index_only(folder, samples)
        call = [sys.executable, __file__, "open", str(folder)]
        runs = [json.loads(subprocess.check_output(call)) for _ in range(arguments.repetitions)]
        size = (folder / INDEX_FILE).stat().st_size
    for run in runs:
        for what, row in run.items():
            print(
                f"{samples} samples, {what}: {row['seconds']} s ({row['cpu_seconds']} s), "
                f"{row['more_own_mb']} MB, with mapped pages {row['more_with_mapped_mb']} MB"
            )
    return {"samples": samples, "shards": samples // PER_SHARD, "index_bytes": size, "processes": runs}


PARTS = {"index": index_part}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "open"], help="open: one process of index")
    parser.add_argument("shards", nargs="?", help="of open")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", help="where the made-up set is for a moment (default: the system's)")
    parser.add_argument("--smoke", action="store_true", help="a set that takes no time")
    parser.add_argument("--out", help="JSON file (benchmarks/results/<date>-<device>-data-<part>.json)")
    arguments = parser.parse_args()
    if arguments.part == "open":
        print(json.dumps(opened(Path(arguments.shards))))
        return
    found = PARTS[arguments.part](arguments)
    source = origin("bench_data")
    name = source["device"].lower().replace(" ", "-")
    path = Path(arguments.out or f"benchmarks/results/{source['date']}-{name}-data-{arguments.part}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "load_average": os.getloadavg()[0], **found}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
