"""The published layout as it comes: from a list of a few hundred JPEGs, some of no use, to an exported model."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from multirank import run_ranks
from PIL import Image
from tiny_runs import logged, run, tiny_recipe

from soar_mega.cli import main
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.data.shards import open_shards
from soar_mega.examples.digits.canvases import make_canvas
from soar_mega.training.history import history

BASE = Path(__file__).parents[1] / "recipes/tiny/base"
BUCKETS = {"16x16": 200, "20x12": 60, "12x20": 30, "24x12": 10}
# what is made wrong with some, and how prepare counts it
FAULTS = {
    "cut off": (9, "picture cannot be read"),
    "no picture": (5, "picture cannot be read"),
    "missing": (7, "line of a list"),
    "no caption": (6, "line of a list"),
    "no width": (3, "line of a list"),
    "no bucket of the model's": (4, "bucket"),
    "broken line": (2, "line of a list"),
    "again": (8, "duplicate"),
}


def write_published(folder: Path) -> None:
    """list.jsonl and MD5.jpg beside it."""
    rng = random.Random(0)
    buckets = [bucket for bucket, count in BUCKETS.items() for _ in range(count)]
    faults = [fault for fault, (count, _) in FAULTS.items() for _ in range(count)]
    faults += [""] * (len(buckets) - len(faults))
    rng.shuffle(faults)
    lines: list[str] = []
    first = b""
    for index, (bucket, fault) in enumerate(zip(buckets, faults, strict=True)):
        width, height = map(int, bucket.split("x"))
        canvas = make_canvas(1, index)
        picture = Image.fromarray(np.uint8(canvas.image.transpose(1, 2, 0) * 255))
        path = folder / f"{index:032x}.jpg"
        picture.resize((width + index % 3, height)).save(path, quality=95)  # never quite the bucket's shape
        row = {"md5": path.stem, "caption_en": canvas.caption.text, "bw": width, "bh": height}
        if fault == "cut off":
            path.write_bytes(path.read_bytes()[:-200])
        elif fault == "no picture":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        elif fault == "missing":
            path.unlink()
        elif fault == "no caption":
            row["caption_en"] = " "
        elif fault == "no width":
            del row["bw"]
        elif fault == "no bucket of the model's":
            row["bw"] = 4000
        elif fault == "again":
            path.write_bytes(first)
        elif not first:
            first = path.read_bytes()
        lines.append("{" if fault == "broken line" else json.dumps(row))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_from_the_list_to_the_exported_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, shards, folder = (tmp_path / name for name in ("images", "shards", "run"))
    images.mkdir()
    write_published(images)
    options = ["--held-out-share", ".1", "--drop-duplicates", "--samples-per-shard", "50"]
    command = ["prepare", str(images / "list.jsonl"), str(shards), "--pipeline-dir", str(BASE), *options]
    assert main(command) == 1, "without --skip-invalid nothing is left out in silence"
    assert main([*command, "--skip-invalid"]) == 0

    rejects = [json.loads(line) for line in (shards / "rejects.jsonl").read_text().splitlines()]
    expected: Counter[str] = Counter()
    for count, kind in FAULTS.values():
        expected[kind] += count
    assert Counter(reject["kind"] for reject in rejects) == expected
    for kind, count in expected.items():
        assert f"{count:10d}  {kind}\n" in caplog.text
    sets = [open_shards(path, str(BASE)) for path in (shards, shards / "held_out")]
    assert sum(map(len, sets)) + len(rejects) == sum(BUCKETS.values())
    assert set(sets[0].info.buckets) == set(BUCKETS) and 10 < len(sets[1]) < 60

    recipe = tiny_recipe(
        shards,
        folder,
        data__validation_path=shards / "held_out",
        parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=2,
        checkpoint__export="true",
        logging__eval_interval=4,
        logging__eval_samples=16,
        train__train_iters=8,
    )
    assert run_ranks(run, 4, recipe, timeout=900) == [0] * 4
    assert list(logged(folder)) == list(range(1, 9))
    assert (folder / "train.log").read_text().count(" held-out at iteration ") == 3
    assert history(folder / "export")[0]["samples"] == 8 * 16

    pipeline = DiffusionPipeline.from_pretrained(folder / "export")
    assert sum(parameter.numel() for parameter in pipeline.transformer.parameters()) > 0
    assert main(["convert", str(folder), str(tmp_path / "converted")]) == 0
    with (
        Reader(folder / "export" / "transformer") as ours,
        Reader(tmp_path / "converted" / "transformer") as made,
    ):
        assert ours.files.keys() == made.files.keys()
        assert all(torch.equal(ours.read(key), made.read(key)) for key in ours.files)
        with Reader(BASE / "transformer") as base:
            assert not all(torch.equal(ours.read(key), base.read(key)) for key in ours.files)
    drawn = tmp_path / "grid.png"
    words = ["--prompt", "a red 3", "--size", "20x12", "--steps", "4", "--out", str(drawn)]
    assert main(["sample", str(folder / "export"), *words]) == 0
    assert Image.open(drawn).size == (20, 12)
