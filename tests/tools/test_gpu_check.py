"""The check of one GPU on parts that need none, and the page that is made of its results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gpu_check
import gpu_page
import origin
import performance_page
import pytest
import settings_page
from gpu_check import Part

MIXED = """
import pytest
def test_good(): pass
@pytest.mark.parametrize("n", range(200))
def test_bad(n): assert n < 0, "below zero"
@pytest.mark.skip(reason="needs something else")
def test_absent(): pass
"""
ABSENT = """
import pytest
def test_good(): pytest.skip("no")
"""
HANGS = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


def script(folder: Path, name: str, code: str) -> Part:
    return Part(name=name, command=[sys.executable, "-c", code], log=folder / f"{name}.log")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("check")
    (folder / "test_mixed.py").write_text(MIXED)
    (folder / "test_absent.py").write_text(ABSENT)
    tests = [gpu_check.test_part(folder / f"{name}.py", folder) for name in ("test_mixed", "test_absent")]
    scripts = [script(folder, "fine", ""), script(folder, "breaks", "raise ValueError('no road')")]
    return folder, gpu_check.run_side_by_side([*tests, *scripts], 120)


def test_each_part_says_what_came_of_it(results: tuple[Path, dict]) -> None:
    folder, said = results
    assert {name: part["outcome"] for name, part in said.items()} == {
        "test_mixed": "failed",
        "test_absent": "passed",
        "fine": "passed",
        "breaks": "failed",
    }
    assert [(test["name"], test["outcome"]) for test in said["test_mixed"]["tests"]][:2] == [
        ("test_good", "passed"),
        ("test_bad[0]", "failed"),
    ]
    assert not gpu_check.has_passed({name: said[name] for name in ("fine", "test_absent")})  # all was skipped
    assert not gpu_check.has_passed({name: said[name] for name in ("fine", "breaks")})
    assert gpu_check.has_passed({"fine": said["fine"]})


def test_the_summary_is_short_and_names_what_did_not_pass(results: tuple[Path, dict]) -> None:
    folder, said = results
    lines = gpu_check.summary(said, folder)
    assert len(lines) <= 90 and "more lines: see the logs" in lines[-1]
    assert "200 failed, 1 passed, 1 skipped" in lines[0]
    assert "  failed  test_mixed::test_bad[0]: AssertionError: below zero" in lines
    alone = gpu_check.summary({name: said[name] for name in ("test_absent", "breaks")}, folder)
    assert alone[-2:] == ["  breaks | ValueError: no road", "  skipped test_absent::test_good: no"]


def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    said = gpu_check.run_side_by_side([script(tmp_path, "hangs", HANGS)], 3)
    assert said["hangs"]["outcome"] == "timed out"
    child = int((tmp_path / "hangs.log").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text()


def test_results_say_where_they_come_from_and_become_a_page(
    results: tuple[Path, dict], tmp_path: Path
) -> None:
    folder, said = results
    path = gpu_check.write({"demo": said["fine"], "test_mixed": said["test_mixed"]}, 1.0, tmp_path)
    written = json.loads(path.read_text())
    assert {"date", "torch", "device", "command", "commit", "versions", "seconds", "parts"} <= written.keys()
    assert written["versions"]["megatron-core"] and written["commit"]
    gpu_check.hand_over(path, folder, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {path.name, "logs.tar.gz"}

    assert path.name not in gpu_page.page(tmp_path)  # it was a CPU
    path.write_text(json.dumps(written | {"device": "NVIDIA H100 80GB HBM3"}))
    page = gpu_page.page(tmp_path)
    demo = next(line for line in page.splitlines() if line.startswith("| demo |"))
    assert demo.startswith(
        f"| demo | passed | {written['date']}, NVIDIA H100 80GB HBM3 | {written['commit']} |"
    )
    assert "| test_mixed | failed (200 failed, 1 passed, 1 skipped): test_bad[0]; test_bad[1]" in page
    assert "| test_models_cuda | not run on a GPU |" in page
    assert (
        f"torch {written['torch']}" in page
        and f"megatron-core {written['versions']['megatron-core']}" in page
    )


def test_the_page_is_made_of_the_results_that_are_there() -> None:
    assert gpu_page.PAGE.read_text() == gpu_page.page(gpu_page.RESULTS), "run python tools/gpu_page.py"


def test_without_a_gpu_nothing_is_claimed() -> None:
    before = sorted(gpu_check.RESULTS.iterdir())
    done = subprocess.run(
        [gpu_check.ROOT / "tools/gpu_check.sh"],
        env=os.environ | {"SOAR_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == gpu_check.NO_GPU
    assert "nothing was run on a GPU" in done.stderr and not done.stdout
    assert sorted(gpu_check.RESULTS.iterdir()) == before


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("--help", 0, "Everything that is checked on one GPU, side by side"),
        ("--kernels", 2, "--kernels is no option"),
    ],
)
def test_the_script_explains_itself_and_starts_nothing(
    tmp_path: Path, word: str, code: int, said: str
) -> None:
    command = [gpu_check.ROOT / "tools/gpu_check.sh", "models", word]
    python = os.environ | {"SOAR_PYTHON": str(tmp_path / "started")}
    (tmp_path / "started").write_text("#!/bin/sh\ntouch $0.now\n")
    (tmp_path / "started").chmod(0o755)
    done = subprocess.run(command, env=python, capture_output=True, text=True, timeout=20)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert "#" not in done.stdout and "set -" not in done.stdout
    assert not (tmp_path / "started.now").exists()


def test_a_word_that_no_part_has_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "models", "kernls"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("the check was started"))
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 2 and "no part is called 'kernls'; there are test_" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [gpu_page, performance_page, settings_page])
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--now", 2)])
def test_a_page_is_not_written_where_help_is_asked_for(
    tool: ModuleType, word: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", word])
    monkeypatch.setattr(tool, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit) as end:
        tool.main()
    assert end.value.code == code and not list(tmp_path.iterdir())


def test_a_copy_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the .git beside it is of another commit."""
    monkeypatch.setenv("SOAR_MEGA_COMMIT", "abc1234")
    assert origin.commit() == "abc1234"


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({}, "python tools/x.py --steps 2"),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "python tools/x.py --steps 2"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 tools/x.py --steps 2"),
        (
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nnodes 2 --nproc-per-node 8 tools/x.py --steps 2",
        ),
    ],
)
def test_a_command_starts_as_many_processes_as_measured(
    variables: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tools/x.py", "--steps", "2"])
    assert origin.origin("x")["command"] == command
