"""The checks of one GPU, side by side: each file of tests/gpu, and the demo. Started by tools/gpu_check.sh.

    python tools/gpu_check.py [WORD ...]      only parts whose name holds one of the words

Every part is a process of its own with a time limit, so that one that hangs or takes CUDA down with it spoils no other.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from origin import device_slug, origin

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 280.0  # seconds of a part
LINES = 90  # of the summary
LIBRARIES = (
    "triton",
    "megatron-core",
    "transformer-engine",
    "deepspeed",
    "diffusers",
    "transformers",
    "numpy",
)
NO_GPU = 2


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command with its output in a file; `report` is where pytest writes what came of each test."""

    name: str
    command: Sequence[str]
    log: Path
    report: Path | None = None


def parts(folder: Path) -> list[Part]:
    """The files of tests/gpu, and the demo."""
    tests = [test_part(file, folder) for file in sorted((ROOT / "tests/gpu").glob("test_*.py"))]
    demo = [sys.executable, "tools/demo.py", "--quick", "--folder", str(folder / "demo")]
    return [*tests, Part(name="demo", command=demo, log=folder / "demo.log")]


def test_part(file: Path, folder: Path) -> Part:
    """One file of tests as a part."""
    report = folder / f"{file.stem}.xml"
    options = ["-v", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder / file.stem}"]
    return Part(
        name=file.stem,
        command=[sys.executable, "-m", "pytest", str(file), *options],
        log=folder / f"{file.stem}.log",
        report=report,
    )


def run_side_by_side(waiting: Sequence[Part], limit: float) -> dict[str, dict[str, Any]]:
    """Starts all parts at once and says what came of each, by name; those beyond the limit (seconds) are killed."""
    started = time.monotonic()
    running = {part.name: (part, start(part)) for part in waiting}
    results: dict[str, dict[str, Any]] = {}
    try:
        while running:
            late = time.monotonic() - started > limit
            for name, (part, process) in list(running.items()):
                if process.poll() is None and not late:
                    continue
                code = process.poll()
                kill(process)
                del running[name]
                seconds = round(time.monotonic() - started, 1)
                outcome = "timed out" if code is None else "passed" if code == 0 else "failed"
                results[name] = {"outcome": outcome, "seconds": seconds, "tests": tests_of(part.report)}
                print(f"{seconds:5.0f} s  {name}: {outcome}", flush=True)
            time.sleep(0.1)
    finally:
        for _, process in running.values():
            kill(process)
    return {part.name: results[part.name] for part in waiting}


def start(part: Part) -> subprocess.Popen[bytes]:
    """In a session of its own, so that killing it takes what it started along."""
    with part.log.open("wb") as log:
        return subprocess.Popen(
            part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"},
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and whatever it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tests_of(report: Path | None) -> list[dict[str, Any]]:
    """Name, outcome, seconds and reason of each test in pytest's report; nothing where there is none."""
    if report is None or not report.exists():
        return []
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        said = {
            "name": case.get("name"),
            "outcome": "passed",
            "seconds": round(float(case.get("time", 0)), 2),
        }
        for kind, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            if (reason := case.find(kind)) is not None:
                said |= {"outcome": outcome, "reason": (reason.get("message") or "").splitlines()[0][:200]}
        found.append(said)
    return found


def has_passed(results: dict[str, dict[str, Any]]) -> bool:
    """Whether every part has passed, and none by skipping all of its tests."""
    return all(
        part["outcome"] == "passed"
        and (not part["tests"] or any(test["outcome"] == "passed" for test in part["tests"]))
        for part in results.values()
    )


def summary(results: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """A line per part, then the tests that did not pass and why, or the end of a log that alone can tell."""
    lines: list[str] = []
    failures: list[str] = []
    skips: list[str] = []
    for name, part in results.items():
        counts = Counter(test["outcome"] for test in part["tests"])
        counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        lines.append(f"{part['outcome']:<9} {name:<28} {part['seconds']:5.0f} s  {counted}")
        for test in part["tests"]:
            if test["outcome"] != "passed":
                told = f"  {test['outcome']:<7} {name}::{test['name']}: {test['reason']}"
                (failures if test["outcome"] == "failed" else skips).append(told)
        if part["outcome"] != "passed" and not counts["failed"]:
            log = (folder / f"{name}.log").read_text(errors="replace").splitlines()
            failures += [f"  {name} | {line[:160]}" for line in log[-12:]]
    details = [*failures, *skips]
    left_out = len(lines) + len(details) - LINES
    if left_out > 0:
        details = [*details[: -left_out - 1], f"  {left_out + 1} more lines: see the logs"]
    return [*lines, *details]


def versions() -> dict[str, str | None]:
    """Of what a result depends on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        told = []
    found["driver"] = told[0] if told else None
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write(results: dict[str, dict[str, Any]], seconds: float, folder: Path) -> Path:
    """The JSON of the whole check."""
    command = " ".join(["tools/gpu_check.sh", *sys.argv[1:]])
    said: dict[str, Any] = {**origin("gpu_check"), "command": command}
    said |= {"versions": versions(), "seconds": round(seconds, 1), "parts": results}
    path = folder / f"{said['date']}-{device_slug()}-check.json"
    path.write_text(json.dumps(said, indent=1) + "\n")
    return path


def hand_over(path: Path, folder: Path, out: Path) -> None:
    """The JSON and the logs of all parts, in few files."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, out)
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for file in sorted([*folder.glob("*.log"), *folder.glob("*.xml"), *folder.glob("demo/logs/*.log")]):
            archive.add(file, file.relative_to(folder))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the parts' names (default: all parts)")
    words = parser.parse_args().words or [""]
    folder = ROOT / "runs" / "gpu_check"
    all_parts = parts(folder)
    for word in words:
        if not any(word in part.name for part in all_parts):
            parser.error(
                f"no part is called {word!r}; there are {', '.join(part.name for part in all_parts)}"
            )
    if not torch.cuda.is_available():
        print(f"no CUDA device for torch {torch.__version__}: nothing was run on a GPU", file=sys.stderr)
        return NO_GPU
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    chosen = [part for part in all_parts if any(word in part.name for word in words)]
    results = run_side_by_side(chosen, LIMIT)
    path = write(results, time.monotonic() - started, RESULTS)
    if "OUT" in os.environ:
        hand_over(path, folder, Path(os.environ["OUT"]))
    print("\n".join(["", *summary(results, folder), f"{path.relative_to(ROOT)}; logs in {folder}"]))
    return 0 if has_passed(results) else 1


if __name__ == "__main__":
    sys.exit(main())
