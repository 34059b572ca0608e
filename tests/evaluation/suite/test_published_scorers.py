"""`--suite tiny`: every published scorer on tiny random weights; its values are those of the images on disk."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import BASE
from PIL import Image

from soar_mega.cli import main
from soar_mega.evaluation.scorers import SCORERS, make_scorer
from soar_mega.evaluation.scorers.tiny_reader import TinyReader
from soar_mega.evaluation.suite.prompt_sets import read_prompt_set
from soar_mega.evaluation.suite.suite_settings import load_suite


def test_the_tiny_suite_asks_what_the_paper_s_does() -> None:
    tiny, paper = (
        {name for each in load_suite(suite).sets for name in each.scorers} for suite in ("tiny", "paper")
    )
    assert tiny - {"soar_mega.evaluation.scorers.tiny_reader:TinyReader"} == paper - {"ocr"} <= SCORERS.keys()


def test_every_scorer_judges_the_images_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["evaluate", f"base={BASE}", "--suite", "tiny", "--out", str(out)]
    assert main([*words, "--weights", str(tmp_path)]) == 1
    assert "the suite tiny makes its own" in capsys.readouterr().err and not out.exists()
    assert main([*words, "--guidance-scale", "3", "--steps", "1"]) == 0
    rows = list(csv.DictReader((out / "outcomes.csv").open()))
    judged = {row["scorer"]: row for row in rows if row["scorer"] == row["value"]}  # the last image of each
    assert judged.keys() == {
        "gen_eval",
        "ocr_tiny",
        "pick_score",
        "clip_score",
        "hps",
        "aesthetic",
        "image_reward",
    }
    sets = map(read_prompt_set, load_suite("tiny").sets)
    metadata = {(each.name, item.prompt): item.metadata for each in sets for item in each.items}
    for name, row in judged.items():
        [drawn] = out.glob(f"images/*/{row['set']}/{row['image']}.png")
        pixels = torch.from_numpy(np.array(Image.open(drawn))).permute(2, 0, 1)[None] / 255
        scorer = TinyReader() if name == "ocr_tiny" else make_scorer(name, out / "tiny_weights")
        values = scorer.score(pixels, [row["prompt"]], [metadata[row["set"], row["prompt"]]])
        assert float(row["score"]) == values[name].item()
    page = (out / "report.html").read_text()
    assert "<td>gen_eval/missing</td>" in page and "<td>gen_eval/color</td>" in page
