"""Peak memory and time of `soar-mega convert` on a random SD3.5-Medium, each conversion in a process of its own.

    python tools/bench_convert.py /a/folder/with/30/GB --out benchmarks/results/DATE-cpu-convert.json

The model, bf16 and in several files, is written into the folder first, converted along a chain of forms back to a
diffusers folder, compared with what it was, and removed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from arguments import result_file
from origin import origin

from soar_mega.convert.checks import diffusers_shapes
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.save import WeightFiles, start_folder
from soar_mega.models.family import presets

SHARD = 10**9  # bytes
STEPS = (
    ("a transformer folder to a single file", "t", "x.safetensors", ["--to", "original"]),
    ("a single file to a transformer folder", "x.safetensors", "u", ["--max-shard-size", "1"]),
    ("a transformer folder to a checkpoint", "u", "run", ["--to", "checkpoint", "--dtype", "bf16"]),
    (
        "a checkpoint to a transformer folder",
        "run",
        "back",
        ["--to", "transformer", "--dtype", "bf16", "--max-shard-size", "1"],
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=presets(), default="sd35_medium")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    path = result_file(arguments.out, "cpu-convert")
    folder = arguments.folder / "bench_convert"
    folder.mkdir(parents=True)
    try:
        measured = measure(folder, arguments.model)
    finally:
        shutil.rmtree(folder)
    path.write_text(
        json.dumps({**origin("bench_convert"), "model": arguments.model, **measured}, indent=1) + "\n"
    )


def measure(folder: Path, model: str) -> dict[str, object]:
    """The peak of each step, and whether the last folder is the first one again."""
    largest, total = write_random(folder / "t", model)
    imports = run([])["peak_bytes"]
    steps = {}
    for name, source, out, options in STEPS:
        steps[name] = run([str(folder / source), str(folder / out), *options])
        steps[name]["peak_above_imports_bytes"] = steps[name]["peak_bytes"] - imports
        print(name, steps[name], flush=True)
    with Reader(folder / "t") as first, Reader(folder / "back") as last:
        is_same = first.files.keys() == last.files.keys() and all(
            torch.equal(first.read(key), last.read(key)) for key in first.files
        )
    return {
        "bytes": total,
        "largest_tensor_bytes": largest,
        "shard_bytes": SHARD,
        "limit_bytes": int(1.2 * largest) + SHARD,
        "peak_of_imports_bytes": imports,
        "steps": steps,
        "bitwise_equal": is_same,
    }


def write_random(folder: Path, model: str) -> tuple[int, int]:
    """A transformer folder of random bf16 numbers -> bytes of the largest tensor, and of all."""
    sizes = presets()[model]
    shapes = diffusers_shapes(sizes)
    files = WeightFiles(SHARD)
    writer = start_folder(folder, sizes.to_diffusers(), shapes, dict.fromkeys(shapes, torch.bfloat16), files)
    generator = torch.Generator().manual_seed(0)
    nbytes = []
    for key, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16()
        writer.write(key, tensor)
        nbytes.append(tensor.nbytes)
    writer.close()
    return max(nbytes), sum(nbytes)


CHILD = """
import sys
import soar_mega.checkpoints.exchange
from soar_mega.cli import main
code = main(["convert", *sys.argv[1:]]) if sys.argv[1:] else 0
print("PEAK", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
raise SystemExit(code)
"""


def run(arguments: list[str]) -> dict[str, float]:
    """Peak of the resident memory of one `soar-mega convert`, or without arguments of its imports, and its time."""
    started = time.perf_counter()
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    peak = int(done.stdout.rsplit("PEAK", 1)[1]) * 1024
    return {"peak_bytes": peak, "seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    main()
