"""The published scorers on tiny random weights, through the command: their values are those of the images on disk."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import BASE, evaluate, write_suite
from PIL import Image

from soar_mega.evaluation.scorers import make_scorer
from soar_mega.evaluation.scorers.tiny import write_tiny_weights
from soar_mega.evaluation.scorers.weights import HPS_WEIGHTS

SCORERS = ["gen_eval", "clip_score", "pick_score", "hps", "aesthetic", "image_reward"]
LINE = {"tag": "colors", "include": [{"class": "clock", "count": 1, "color": "red"}], "prompt": "a red clock"}


def test_every_scorer_judges_the_images_on_disk_or_none_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "weights", tmp_path / "out"
    for name in SCORERS:
        write_tiny_weights(name, weights)
    sets = {"published": {"prompts": "lines.jsonl", "scorers": SCORERS}}
    published = {"SD3.5-M": {"gen_eval": 0.63, "clip_score": 0.285}}
    suite = write_suite(tmp_path, sets=sets, guidance_scale=[3], published=published)
    (tmp_path / "lines.jsonl").write_text(json.dumps(LINE) + "\n")

    hps = (weights / HPS_WEIGHTS.path).rename(tmp_path / "elsewhere.pt")
    assert evaluate(suite, out, f"base={BASE}", "--weights", str(weights)) == 1
    assert str(weights / HPS_WEIGHTS.path) in capsys.readouterr().err and not [*out.glob("**/*.png")]
    hps.rename(weights / HPS_WEIGHTS.path)
    assert evaluate(suite, out, f"base={BASE}", "--weights", str(weights)) == 0

    rows = {row["value"]: row for row in csv.DictReader((out / "outcomes.csv").open())}
    [drawn] = out.glob("images/*/*/*.png")
    pixels = torch.from_numpy(np.array(Image.open(drawn))).permute(2, 0, 1)[None] / 255
    for name in SCORERS:
        value = make_scorer(name, weights).score(pixels, [str(LINE["prompt"])], [LINE])[name].item()
        assert float(rows[name]["score"]) == value
    page = (out / "report.html").read_text()
    assert "<td>SD3.5-M (published)</td><td>0.63</td><td>0.285</td><td></td>" in page
    assert "<td>gen_eval/missing</td>" in page and "<td>gen_eval/color</td>" in page
