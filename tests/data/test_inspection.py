"""What `soar-mega data inspect` says of a set, against numbers that were put into it."""

import json
import math
from pathlib import Path

import pytest
import torch
from data_fixtures import make_sample, make_shards
from PIL import Image

from soar_mega.cli import main
from soar_mega.data.inspection import inspect
from soar_mega.data.prepare import prepare
from soar_mega.data.shards import open_shards

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


def test_latents_are_told_by_bucket(tmp_path):
    samples = [make_sample(i, (16, 16) if i < 6 else (12, 20)) for i in range(8)]
    for sample in samples:
        sample.latent_std.fill_(0.5)
    samples[7].latent_mean[0, 0, 0] = math.nan
    samples[6].latent_mean[0, 0, :2] = math.inf
    found = inspect(open_shards(make_shards(tmp_path / "s", samples)), samples=100)
    assert found["samples"] == found["looked_at"] == 8 and found["shards"] == 2
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar"))
    square, wide = (found["buckets"][bucket]["latents"] for bucket in ("16x16", "12x20"))
    assert found["buckets"]["16x16"]["samples"] == 6 and square["mean"] == pytest.approx(2.5)
    numbers = torch.arange(6.0)
    assert square["std"] == pytest.approx((numbers.var(correction=0) + 0.25).sqrt().item())
    assert square["not_finite"] == 0 and wide["not_finite"] == pytest.approx(3 / (2 * 4 * 10 * 6))
    assert wide["mean"] == pytest.approx((6 * 238 + 7 * 239) / 477)
    assert found["captions"]["characters"] == {"shortest": 9, "median": 9, "p95": 9, "longest": 9}


def test_a_damaged_sample_is_named_and_a_few_stand_for_many(tmp_path):
    folder = make_shards(tmp_path / "s", [make_sample(i) for i in range(20)])
    offset, size, _ = open_shards(folder)._index.place("latents", 0)
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.seek(offset + size - 1)
        file.write(b"!")
    found = inspect(open_shards(folder), samples=5)
    assert found["looked_at"] == 5
    (why,) = found["buckets"]["16x16"]["latents"]["unreadable"]
    assert why.startswith("image0.png (shard-000000.tar") and "checksum" in why
    assert found["buckets"]["16x16"]["latents"]["mean"] == pytest.approx((4 + 8 + 12 + 16) / 4)


def test_a_caption_that_is_not_there_is_named(tmp_path):
    folder = make_shards(tmp_path / "s", [make_sample(0)])
    shards = open_shards(folder)
    offset, size, _ = shards._index.place("text", 0)
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.seek(offset + size)
        file.write(b"!" * 1024)
    with pytest.raises(ValueError, match=r"caption of image0\.png .* cannot be read"):
        shards.captions(0)


def test_the_command_counts_tokens_and_draws_what_was_encoded(tmp_path, capsys):
    """Half of the pictures are black and half are white: so are those of the sheet."""
    captions = ["a cat", "red " * 200, "\u96ea", "dog"]
    (tmp_path / "images").mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (255 * (number % 2),) * 3).save(tmp_path / f"images/{number}.png")
        (tmp_path / f"images/{number}.txt").write_text(caption, encoding="utf-8")
    prepare(tmp_path / "images", tmp_path / "s", BASE)
    sheet = tmp_path / "sheet.png"
    call = [
        "data",
        "inspect",
        str(tmp_path / "s"),
        "--pipeline-dir",
        str(BASE),
        "--contact-sheet",
        str(sheet),
    ]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["captions"]["characters"]["longest"] == len(captions[1].strip())
    tokens = found["captions"]["tokens"]
    assert tokens.keys() == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert {part: row["cut"] for part, row in tokens.items()} == found["captions_cut"]
    assert tokens["text_encoder"]["cut"] == 1 and tokens["text_encoder"]["longest"] > 77
    shown = Image.open(sheet)
    assert shown.size == (36, 36)
    light = [sum(shown.getpixel((18 * x + 8, 18 * y + 8))) / 765 for y in (0, 1) for x in (0, 1)]
    assert max(light[0], light[2]) + 0.3 < min(light[1], light[3]), light
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "4 samples in 1 shards" in said and "16x16" in said and "1 of 4 are cut" in said
    with pytest.raises(SystemExit):
        main(["data", "look", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--samples", "0"], "at least 1"), (["--contact-sheet", "x.png"], "pipeline-dir")],
)
def test_what_cannot_be_is_refused(options, message, tmp_path, capsys):
    assert main(["data", "inspect", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
