"""`python -m soar_mega.examples.digits`: pipelines that draw canvases, beside real ones."""

import json
import shutil
from pathlib import Path

import pytest

from soar_mega.examples.digits.__main__ import main

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


def test_pipelines_are_compared_with_real_canvases(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "metrics.json"
    words = ["--steps", "1", "--prompts-per-category", "2", "--guidance-scale", "1", "--guidance-scale", "3"]
    drift = ["--held-out", str(shards), "--drift-samples", "4", "--drift-steps", "1"]
    assert main([f"base={BASE}", *words, *drift, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    base = report["pipelines"]["base"]
    assert list(base["guidance"]) == list(base["drift"]["scales"]) == ["1", "3"]
    assert set(base["guidance"]["3"]["benchmark"]) > {"overall", "ocr", "counting"}
    assert report["real"]["verifier_accuracy"] > 0.95
    said = capsys.readouterr().out
    assert "real canvases" in said and "0.90 -> 0.65" in said


def test_a_pipeline_that_draws_other_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config = tmp_path / "base" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    assert main([str(tmp_path / "base"), "--out", str(tmp_path / "metrics.json")]) == 1
    assert "draws 32 pixels and canvases have 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompts-per-category", "-3", "--prompts-per-category must be at least 1"),
        ("--guidance-scale", "nan", "--guidance-scale must be a number"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    option: str, value: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(BASE), option, value, "--out", str(tmp_path / "metrics.json")]) == 1
    assert words in capsys.readouterr().err
