"""An evaluation from prompts to report: the same bytes on one process and two, after a kill, in any batch."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import BASE, evaluate, kept, write_suite
from multirank import run_ranks
from PIL import Image

from soar_mega.checkpoints import model_source
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.cli import main
from soar_mega.evaluation.scorers.scorer_files import INCEPTION


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """suite.yaml, and in out/ what it makes of the base."""
    folder = tmp_path_factory.mktemp("suite")
    suite = write_suite(folder, published={"SD3.5-M": {"jpeg_incompressibility": 0.63}})
    assert evaluate(suite, folder / "out", f"base={BASE}") == 0
    return folder


def test_the_report_holds_what_the_images_got(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = road / "out"
    said = json.loads((out / "report.json").read_text())
    rows = list(csv.DictReader((out / "outcomes.csv").open()))
    assert len([row for row in rows if row["scorer"] == "digits"]) == 2 * (4 + 3)
    for guidance in (3.0, 1.0):
        own = [
            row for row in rows
            if row["set"] == "digits" and row["scorer"] == "digits" and float(row["guidance_scale"]) == guidance
        ]  # fmt: skip
        by_tag = [
            np.mean([float(row["score"]) for row in own if row["category"] == tag])
            for tag in ("counting", "colors")
        ]
        [score] = [
            row for row in said["scores"]
            if row["set"] == "digits" and row["category"] == "" and row["guidance_scale"] == guidance
        ]  # fmt: skip
        assert score["score"] == np.mean(by_tag) and score["prompts"] == 4
    assert said["sets"]["numbers"] | {"file": ""} == {"file": "", "prompts": 2, "images": 3}
    page = (out / "report.html").read_text()
    assert "<td>SD3.5-M (published)</td><td></td><td></td><td>0.63</td>" in page
    assert "<svg" in page and "http" not in page and page.count("data:image/png;base64,") == 4 + 3 + 3


@pytest.mark.slow
def test_two_processes_and_another_batch_size_make_the_same_bytes(road: Path, tmp_path: Path) -> None:
    words = (f"base={BASE}", "--batch-size", "3")
    run_ranks(_evaluate, 2, str(road / "suite.yaml"), str(tmp_path), words)
    assert len(kept(road / "out")) == 2 * (7 + 5)
    assert kept(tmp_path) == kept(road / "out")


@pytest.mark.slow
def test_a_checkpoint_that_lies_on_two_ranks_draws_what_its_pipeline_does(road: Path, tmp_path: Path) -> None:
    """Up to the rounding to 8 bits; and its images serve a report that is made on one process."""
    run = tmp_path / "run"
    assert main(["convert", str(BASE), str(run)]) == 0
    words = ("--pipeline-dir", str(BASE), "--guidance-scale", "3")
    cut = (f"cut={run}", *words, "--tensor-model-parallel-size", "2")
    run_ranks(_evaluate, 2, str(road / "suite.yaml"), str(tmp_path / "out"), cut)
    drawn = sorted((tmp_path / "out").glob("images/cut-*/*/*.png"))
    assert len(drawn) == 7
    for path in drawn:
        [same] = (road / "out").glob(f"images/base-g3-*/{path.parent.name}/{path.name}")
        assert np.abs(_pixels(path) - _pixels(same)).max() <= 1
    before = kept(tmp_path / "out", "cut")
    assert evaluate(road / "suite.yaml", tmp_path / "out", f"cut={run}", f"base={BASE}", *words) == 0
    assert kept(tmp_path / "out", "cut") == before


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def _evaluate(suite: str, out: str, words: tuple[str, ...]) -> None:
    assert evaluate(Path(suite), Path(out), *words) == 0


def test_a_killed_evaluation_goes_on_to_the_same_bytes(road: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["evaluate", f"base={BASE}", "--suite", str(road / "suite.yaml"), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "soar_mega", *words])
    while process.poll() is None and len(list(out.glob("images/*/*/*.png"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert not (out / "report.json").exists()
    # as a kill in the middle of a line leaves it
    for part in out.glob("scores/*/*.part-0"):
        part.write_bytes(part.read_bytes()[:-9])
    assert main(words) == 0
    assert kept(out) == kept(road / "out")
    assert all(
        (out / name).read_bytes() == (road / "out" / name).read_bytes()
        for name in ("table.csv", "outcomes.csv")
    )


def test_what_is_there_is_not_made_again(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor under another name; other sampling steps and other weights are other images."""
    out = tmp_path / "out"
    shutil.copytree(road / "out", out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("images/*/*/*.png")}

    def refuse(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("soar_mega.evaluation.generate.Generator.load", refuse)
        assert evaluate(road / "suite.yaml", out, f"other={BASE}") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("images/*/*/*.png")} == times
    assert list(json.loads((out / "report.json").read_text())["models"]) == ["other"]

    changed = tmp_path / "changed"
    shutil.copytree(BASE, changed)
    config = changed / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.0}))
    assert (
        evaluate(road / "suite.yaml", out, f"base={BASE}", f"shifted={changed}", "--guidance-scale", "3") == 0
    )
    folders = {path.name.rpartition("-")[0] for path in (out / "images").iterdir()}
    assert folders == {"base-g3-s2", "base-g1-s2", "shifted-g3-s2"}
    said = json.loads((out / "report.json").read_text())
    assert {(row["model"], row["minus"]) for row in said["differences"]} == {("shifted", "base")}


def test_a_run_is_watched_to_its_end(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each checkpoint is a point of the curves, one that is removed while it is read is not; a complete run ends it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert main(["convert", str(BASE), str(run)]) == 0
    RunFolder(run).mark_complete(0, 0)
    out = tmp_path / "out"
    monkeypatch.setattr(model_source, "content_hash", str)  # copies of one checkpoint are others
    words = ("--watch", str(run), "--pipeline-dir", str(BASE), "--guidance-scale", "1")
    assert evaluate(road / "suite.yaml", out, *words) == 0
    # later checkpoints come, and the run removes the first one, and one in between while it is read
    for name in ("iter_0000003", "iter_0000005"):
        shutil.copytree(run / "iter_0000000", run / name)
    shutil.rmtree(run / "iter_0000000")
    real = model_source.load_model

    def load(source: Path, *more: Any) -> Any:
        if source.name == "iter_0000003":
            source.rename(source.with_name("iter_0000003.deleted"))
        return real(source, *more)

    monkeypatch.setattr(model_source, "load_model", load)
    assert evaluate(road / "suite.yaml", out, *words) == 0
    assert "iteration 3 was removed before it could be evaluated" in caplog.text
    said = json.loads((out / "report.json").read_text())
    assert list(said["models"]) == ["iter_0000000", "iter_0000005"]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    scores = [row["score"] for row in said["scores"] if row["scorer"] == "jpeg_incompressibility"]
    points = events.Scalars("evaluate/jpeg_incompressibility/guidance 1, 2 steps")
    assert {point.step for point in points} == {0, 5}
    assert [point.value for point in points] == pytest.approx([scores[0]] * len(points))
    # images of weights that are gone are not reported as if drawn with other settings
    assert evaluate(road / "suite.yaml", out, *words, "--shift", "3") == 0
    assert "iter_0000000.json: its images were drawn with shift None, 3.0 is asked for now" in caplog.text
    assert list(json.loads((out / "report.json").read_text())["models"]) == ["iter_0000005"]


@pytest.mark.slow
def test_a_run_may_remove_a_checkpoint_that_is_being_read(road: Path, tmp_path: Path) -> None:
    """When one process has read it and the other has not: both are told, and go on with the next one."""
    run = tmp_path / "run"
    assert main(["convert", str(BASE), str(run)]) == 0
    shutil.copytree(run / "iter_0000000", run / "iter_0000005")
    RunFolder(run).mark_complete(5, 0)
    words = ("--watch", str(run), "--pipeline-dir", str(BASE), "--guidance-scale", "1")
    run_ranks(_evaluate_while_one_is_removed, 2, str(road / "suite.yaml"), str(tmp_path / "out"), words)
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(said["models"]) == ["iter_0000005"]


def _evaluate_while_one_is_removed(suite: str, out: str, words: tuple[str, ...]) -> None:
    real = model_source.load_model

    def load(source: Path, *more: object) -> object:
        model = real(source, *more)  # type: ignore[arg-type]
        if source.name == "iter_0000000" and os.environ["RANK"] == "1":
            source.rename(source.with_name("iter_0000000.deleted"))
            raise FileNotFoundError(f"no such file: {source}")
        return model

    model_source.load_model = load  # type: ignore[assignment]
    assert evaluate(Path(suite), Path(out), *words) == 0


def test_distances_to_real_images_are_measured_once_for_each_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What measures them is not installed or has no weights here, which is told before the first image."""
    (tmp_path / "photos").mkdir()
    digits = {"prompts": "digits", "scorers": ["jpeg_incompressibility"], "real": "photos"}
    suite = write_suite(tmp_path, sets={"digits": digits}, guidance_scale=[1, 3])
    words = (f"base={BASE}", "--weights", str(tmp_path / "weights"))
    assert evaluate(suite, tmp_path / "out", *words) == 1 and "FID" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()
    network = tmp_path / "weights" / INCEPTION.path
    network.parent.mkdir(parents=True)
    network.write_bytes(b"a network")
    seen: list[int] = []
    kept: set[Path] = set()

    def measure(images: Path, real: Path, weights: Path, device: str, features: Path) -> dict[str, float]:
        assert real == tmp_path / "photos"
        kept.add(features)
        seen.append(len(list(images.glob("*.png"))))
        return {"fid": 12.5}

    monkeypatch.setattr("soar_mega.evaluation.suite.distances.distance_to_held_out", measure)
    monkeypatch.setattr("soar_mega.evaluation.suite.distances.check_distances", lambda *ignored: None)
    for _ in range(2):
        assert evaluate(suite, tmp_path / "out", *words) == 0
    assert seen == [4, 4] and len(kept) == 1  # at both scales, with one set of features of the real images
    lines = tmp_path / "digits" / "test_metadata.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    assert evaluate(suite, tmp_path / "out", *words) == 0
    assert seen[2:] == [3, 3] and len(list((tmp_path / "out" / "images").glob("*/digits/*.png"))) == 8
    row, _ = json.loads((tmp_path / "out" / "report.json").read_text())["distances"]
    assert (row["model"], row["set"], row["fid"]) == ("base", "digits", 12.5)
    assert "<td>12.5</td>" in (tmp_path / "out" / "report.html").read_text()
