"""A suite on a GPU, where images are drawn and decoded many at a time: the CPU's pictures and the CPU's drift."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import make_shards
from verbs import Verb

MODELS = ("base=recipes/tiny/base",)
SMALL = ("--suite", "digits", "--steps", 4, "--drift-samples", 16, "--guidance-scale", 3)


def test_a_suite_is_what_it_is_on_the_cpu(tmp_path: Path) -> None:
    held_out = make_shards(tmp_path / "shards", 16, seed=1)
    places = {"here": ("--batch-size", 7), "cpu": ()}  # the last batch is not full
    started = [
        Verb("evaluate", *MODELS, *SMALL, *more, "--held-out", held_out, "--out", tmp_path / place,
             log=tmp_path / f"{place}.log", on_cpu=place == "cpu")
        for place, more in places.items()
    ]  # fmt: skip
    for one in started:
        one.finish()
    drawn = {place: sorted((tmp_path / place / "images").rglob("*.png")) for place in places}
    assert len(drawn["here"]) == len(drawn["cpu"]) > 20
    apart = [
        abs(np.asarray(Image.open(here)).astype(int) - np.asarray(Image.open(there)).astype(int)).max()
        for here, there in zip(drawn["here"], drawn["cpu"], strict=True)
        if here.relative_to(tmp_path / "here") == there.relative_to(tmp_path / "cpu")
    ]
    assert len(apart) == len(drawn["cpu"])
    assert max(apart) <= 4  # of 255: convolutions of a GPU may round to tf32
    said = [json.loads((tmp_path / place / "report.json").read_text()) for place in places]
    for here, there in zip(*(each["models"]["base"]["drift"]["scales"]["3"] for each in said), strict=True):
        assert here["errors"] == pytest.approx(there["errors"], rel=1e-3)
