"""Measures what feeding costs, one part of it at a time.

    python tools/bench_data.py index           a made-up set of 10 M samples: what it takes a rank to open it
    python tools/bench_data.py feed            samples per second of the loader and of plain webdataset
    python tools/bench_data.py feed --smoke

index: each measurement is of a process of its own. Seconds are wall clock, and of the processor in brackets; memory is
what the process has more than before: its own, and with the pages of the mapped index that it touched. The file was
just written, so it comes from memory, not from a disk.

feed: latents of 512 x 512 pixels and 333 tokens of 4096, on the CPU, of the same shards. webdataset reads the tars in
sequence and draws latents with torch.randn; the loader reads in its keyed order, checks checksums and numbers, draws
keyed noise, and says after each batch how a run would go on. Both in turn, in processes of their own, with 0, 1 and 2
reader processes. Processor time is that of the process and its readers: it is what a loaded machine can measure. The
wait is that of a loop whose step takes --step-seconds besides. Writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from arguments import positive, result_file
from origin import device_slug, origin
from safetensors.torch import load, save_file

from soar_mega.config import DataConfig
from soar_mega.data.info import DatasetInfo
from soar_mega.data.json_files import write_json
from soar_mega.data.loader import Loader
from soar_mega.data.made_up import write_made_up_shards
from soar_mega.data.order import Order, Place
from soar_mega.data.readers import READ_AHEAD
from soar_mega.data.sample_index import INDEX_FILE, RECORD, join
from soar_mega.data.shard_writer import (
    DATASET_FILE,
    EMPTY_FILE,
    EncodedSample,
    ShardWriter,
    shard_name,
    write_dataset_file,
)
from soar_mega.data.shards import open_shards

Json = dict[str, Any]
Batches = Generator[Any, None, None]
SIZES = ["1024x1024", "896x1152", "1152x896", "768x1344", "1344x768"]
PER_SHARD = 1000
PART_BYTES = 1 << 19  # of a sample's latents, and of its text
KEY_BYTES, NAME_BYTES = 9, 32
FEED_SHARDS, BATCH, WORKERS = 4, 16, (0, 1, 2)


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


def write_feed(folder: Path, samples: int, tokens: tuple[int, int], side: int) -> None:
    """Four shards of noise in the shapes of a model."""
    info = DatasetInfo(
        buckets={f"{8 * side}x{8 * side}": samples},
        latent_channels=16,
        vae_scale_factor=8,
        text_shape=tokens,
        pooled_size=2048,
        max_sequence_length=1,
        text_dtype="bfloat16",
        encoders={},
    )
    folder.mkdir()
    generator, shape = torch.Generator().manual_seed(0), (16, side, side)
    for number in range(FEED_SHARDS):
        writer = ShardWriter(folder, number)
        for key in range(number, samples, FEED_SHARDS):
            sample = EncodedSample(
                name=f"{key}.jpg",
                caption=f"number {key}",
                bucket=next(iter(info.buckets)),
                latent_mean=torch.randn(shape, generator=generator),
                latent_std=torch.full(shape, 0.1),
                text=torch.randn(tokens, generator=generator).bfloat16(),
                pooled=torch.randn(2048, generator=generator).bfloat16(),
            )
            writer.add(f"{number:03d}{key:06d}", sample)
        writer.close()
    save_file({"text": sample.text, "pooled": sample.pooled}, folder / EMPTY_FILE)
    write_dataset_file(folder, info, FEED_SHARDS)


def loader_batches(folder: Path, workers: int, batch: int) -> Batches:
    """As a run reads them."""
    loader = Loader(DataConfig(path=str(folder), num_workers=workers), 42, batch)
    try:
        for read in loader:
            yield read, loader.state_dict()
    finally:
        loader.close()


def webdataset_batches(folder: Path, workers: int, batch: int) -> Batches:
    """Its usual pipeline, without end."""
    import webdataset

    def decode(sample: Json) -> tuple[torch.Tensor, ...]:
        latents, text = (load(sample[f"{part}.safetensors"]) for part in ("latents", "text"))
        mean = latents["mean"]
        return mean + latents["std"] * torch.randn_like(mean), text["text"], text["pooled"]

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).map(decode).batched(batch)
    ahead = READ_AHEAD if workers else None
    yield from webdataset.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=ahead)


WAYS = {"loader": loader_batches, "webdataset": webdataset_batches}


def fed(folder: Path, way: str, workers: int, batch: int, steps: int, step_seconds: float) -> Json:
    """What one way does in this process: at full speed, then with steps that do something else."""
    torch.set_num_threads(1)
    batches = WAYS[way](folder, workers, batch)
    for _ in range(1 + READ_AHEAD * workers):  # readers are some batches ahead from then on
        next(batches)
    started, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(steps):
        next(batches)
    seconds, cpu, waited = time.perf_counter() - started, cpu_seconds() - cpu, 0.0
    for _ in range(steps):
        time.sleep(step_seconds)  # the device computes
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    batches.close()
    share = waited / (waited + steps * step_seconds)
    return {
        "samples_per_second": steps * batch / seconds,
        "cpu_ms_per_sample": 1000 * cpu / steps / batch,
        "wait_share": share,
    }


def cpu_seconds() -> float:
    """Of this process and the processes that it has started."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children()))


def feed_part(arguments: argparse.Namespace) -> Json:
    tokens, side, samples, steps = ((8, 64), 8, 64, 2) if arguments.smoke else ((333, 4096), 64, 128, 12)
    step_seconds = 0.01 if arguments.smoke else arguments.step_seconds
    found: Json = {"batch": BATCH, "steps": steps, "step_seconds": step_seconds, "workers": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "shards"
        write_feed(folder, samples, tokens, side)
        for workers in WORKERS:
            runs: dict[str, list[Json]] = {way: [] for way in WAYS}
            for _ in range(arguments.repetitions):
                for way, rows in runs.items():
                    words = [str(folder), way, str(workers), str(BATCH), str(steps), str(step_seconds)]
                    said = subprocess.check_output([sys.executable, __file__, "fed", *words])
                    rows.append(json.loads(said))
            row: Json = {"runs": runs}
            for key in ("samples_per_second", "cpu_ms_per_sample", "wait_share"):
                row[key] = {way: statistics.median(r[key] for r in rows) for way, rows in runs.items()}
            speed = row["samples_per_second"]
            row["ratio"] = speed["loader"] / speed["webdataset"]
            cpu = row["cpu_ms_per_sample"]
            row["cpu_ratio"] = cpu["webdataset"] / cpu["loader"]
            found["workers"][str(workers)] = row
            print(
                f"{workers} workers: loader {speed['loader']:.1f}, webdataset {speed['webdataset']:.1f} samples/s, "
                f"ratio {row['ratio']:.2f}; {cpu['loader']:.1f} and {cpu['webdataset']:.1f} ms of processors per "
                f"sample, ratio {row['cpu_ratio']:.2f}; waits {row['wait_share']['loader']:.1%} and "
                f"{row['wait_share']['webdataset']:.1%} of steps of {step_seconds} s"
            )
    return found


PARTS = {"index": index_part, "feed": feed_part}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "open", "fed"], help="open, fed: one process of these")
    parser.add_argument("words", nargs="*", help="of open and fed")
    parser.add_argument("--samples", type=positive, default=10_000_000)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--folder", help="where the made-up set is for a moment (default: the system's)")
    parser.add_argument("--smoke", action="store_true", help="a set that takes no time")
    parser.add_argument("--out", help="JSON file (benchmarks/results/<date>-<device>-data-<part>.json)")
    arguments = parser.parse_args()
    if arguments.part == "open":
        print(json.dumps(opened(Path(arguments.words[0]))))
        return
    if arguments.part == "fed":
        shards, way, workers, batch, steps, seconds = arguments.words
        found = fed(Path(shards), way, int(workers), int(batch), int(steps), float(seconds))
        print(json.dumps(found))
        return
    path = result_file(arguments.out, f"{device_slug()}-data-{arguments.part}")
    found = PARTS[arguments.part](arguments)
    content = {**origin("bench_data"), "load_average": os.getloadavg()[0], **found}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
