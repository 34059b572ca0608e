"""What cannot be measured, or written, is said before anything is measured."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments
import bench_checkpoint
import bench_convert
import bench_data
import bench_host
import bench_kernels
import bench_weights
import compare_baseline
import pytest
import tune_kernels

from soar_mega import distributed


@pytest.fixture(autouse=True)
def no_world():
    yield
    distributed.stop_world()


def measures(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("something is measured")


TOOLS: dict[str, tuple[Callable[[], Any], list[str], list[tuple[Any, str]]]] = {
    "bench_host": (bench_host.main, [], [(bench_host, "measure")]),
    "bench_kernels": (bench_kernels.main, [], [(bench_kernels, "measured"), (bench_kernels, "predicted")]),
    "bench_checkpoint": (bench_checkpoint.main, [], [(bench_checkpoint, "make_engine")]),
    "bench_weights": (bench_weights.main, [], [(bench_weights, "make_engine")]),
    "bench_convert": (bench_convert.main, ["FOLDER"], [(bench_convert, "measure")]),
    "bench_data": (bench_data.main, ["index"], [(bench_data.PARTS, "index")]),
    "compare_baseline": (
        compare_baseline.main,
        [],
        [(compare_baseline, name) for name in ("fastest", "measure_in_turns", "measure_alone")],
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_place_that_cannot_be_written_is_found_before_measuring(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, words, measuring = TOOLS[tool]
    for owner, name in measuring:
        (monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr)(owner, name, measures)
    (tmp_path / "file").write_text("")
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *words, "--out", str(tmp_path / "file" / "x.json")])
    with pytest.raises(SystemExit, match=r"^--out: .*file cannot be written: "):
        main()


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text(json.dumps("an earlier result"))
    assert arguments.result_file(str(there), "x") == there
    assert there.read_text() == '"an earlier result"'
    new = arguments.result_file(tmp_path / "a" / "b" / "new.json", "x")
    assert new.parent.is_dir() and not list(new.parent.iterdir())
    with pytest.raises(SystemExit, match=f"^--out: {tmp_path} cannot be written: Is a directory$"):
        arguments.result_file(tmp_path, "x")


@pytest.mark.parametrize(
    "main, words, message",
    [
        (bench_host.main, ["--rounds", "0"], "--rounds: '0': it must be a whole number, at least 1"),
        (bench_host.main, ["--dual", "-1"], "--dual: '-1': it must be a whole number, at least 0"),
        (bench_host.main, ["--layers", "2", "--dual", "3"], "--dual 3: there are --layers 2"),
        (bench_kernels.main, ["--only", "nosuch"], "--only 'nosuch' is in none of these names: "),
        (tune_kernels.main, ["--only", "nosuch"], "--only 'nosuch' is in none of these names: adaln, "),
        (bench_checkpoint.main, ["--saves", "1"], "--saves must be 2 or more"),
        (
            bench_weights.main,
            ["--repetitions", "x"],
            "--repetitions: 'x': it must be a whole number, at least 1",
        ),
        (
            bench_data.main,
            ["index", "--repetitions", "0"],
            "--repetitions: '0': it must be a whole number, at least 1",
        ),
        (
            compare_baseline.main,
            ["--batch-size", "0"],
            "--batch-size: '0': it must be a whole number, at least 1",
        ),
        (
            compare_baseline.main,
            ["--points", "-1"],
            "--points: '-1': it must be a whole number, at least 0",
        ),
        (compare_baseline.main, ["--shift", "0"], "--shift: '0': it must be a number, above 0"),
        (
            compare_baseline.main,
            ["--row-seconds", "x"],
            "--row-seconds: 'x': it must be a number, at least 0",
        ),
        (bench_convert.main, ["folder", "--model", "huge"], "--model: invalid choice: 'huge'"),
        (compare_baseline.main, ["--model", "huge"], "--model: invalid choice: 'huge'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    main: Callable[[], Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = [] if main is tune_kernels.main else ["--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["tool.py", *words, *out])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_names_of_rows_are_checked_before_sizes_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fastest", "measure_in_turns", "measure_alone"):
        monkeypatch.setattr(compare_baseline, name, measures)
    words = ["--rows", "published procedure", "nosuch", "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["compare_baseline.py", *words])
    with pytest.raises(ValueError, match=r"--rows names no row of: .*soar_mega \(unknown: nosuch\)"):
        compare_baseline.main()
