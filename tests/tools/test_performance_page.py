"""docs/performance.md says what benchmarks/results says, and shows a new file of any tool."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_host
import compare_baseline
import performance_page
import pytest
from baseline.case import make_case

from soar_mega.stages import SoarConfig

SOURCE = {
    "date": "2026-01-02",
    "torch": "2.11.0",
    "device": "NVIDIA H100 80GB HBM3",
    "command": "python x.py",
}


def put(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps({**SOURCE, **content}))


def test_the_page_is_made_of_the_results_that_are_there() -> None:
    made = performance_page.page(performance_page.RESULTS)
    assert performance_page.PAGE.read_text() == made, "run python tools/performance_page.py"


def test_the_readme_says_what_was_measured() -> None:
    def row(file: str, name: str) -> dict[str, Any]:
        newest = max(performance_page.RESULTS.glob(f"*-{file}.json"))  # names begin with the date
        [found] = [row for row in json.loads(newest.read_text())["rows"] if row["name"] == name]
        return found

    def speed(case: str, name: str) -> str:
        return f"{row(case, name)['ratio']:.2f}".removeprefix("0")

    on_h100 = "h100-80gb-hbm3-compare-sd35_medium"
    torchs = row(on_h100, "soar_mega, 16 points, CUDA graphs")  # attention, as the published procedure's
    flash = row(on_h100, "soar_mega, flash attention, 16 points, CUDA graphs")
    repaired = row(on_h100, "all three repaired")
    fp8 = row(on_h100, "soar_mega, FP8, flash attention, 16 points, CUDA graphs")
    small = "soar_mega, forwards as large as the first row's"
    readme = " ".join((performance_page.PAGE.parents[1] / "README.md").read_text().split())
    for words in (
        f"with torch's attention {torchs['samples_per_second']:.2f} samples per second, "
        f"{torchs['ratio']:.1f} times the published procedure",
        f"{torchs['ratio'] / repaired['ratio']:.1f} times that procedure with its three costly habits repaired",
        f"With flash-attn 3 it is {flash['samples_per_second']:.2f}, in FP8 {fp8['samples_per_second']:.2f}.",
        f"at micro-batch {row(on_h100, 'published procedure')['micro_batch']}, the only size tried",
        f"takes {speed('cpu-compare-wide', 'soar_mega')} times the samples per second",
        f"or {speed('cpu-compare-wide', small)} times in",
        f"the built-in model {speed('cpu-compare-tiny', 'soar_mega')} times",
        f"or {speed('cpu-compare-tiny', small)} times in",
    ):
        assert words in readme, words


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    assert performance_page.page(tmp_path).count(performance_page.NONE) == 4


def test_a_comparison(tmp_path: Path) -> None:
    result = compare_baseline.Result(
        name="soar_mega",
        micro_batch=8,
        seconds=[1.0],
        samples_per_second=10.25,
        ratio=4.25,
        ratio_range=(4.0, 4.5),
        peak_memory=52 * 2**30,
        forward_units=23.0,
    )
    said = compare_baseline.report(make_case("wide", stage=SoarConfig(), batch_size=4), [result])
    put(tmp_path, "2026-01-01-h100-compare-wide.json", said | {"date": "2026-01-01", "command": "an old one"})
    put(tmp_path, "2026-01-02-h100-compare-wide.json", said | SOURCE)
    put(tmp_path, "2026-01-02-b200-compare-wide.json", said | SOURCE | {"device": "NVIDIA B200"})
    page = performance_page.page(tmp_path)
    assert page.count("| soar_mega | 8 | 10.25 | 4.25 (4.00 to 4.50) | 52.00 |") == 2
    assert "an old one" not in page and "wide on NVIDIA B200" in page
    said["rows"][0]["mfu"] = 0.504
    put(tmp_path, "2026-01-02-h100-compare-wide.json", said | SOURCE)
    assert "| 52.00 | 50 % |" in performance_page.page(tmp_path)
    said["rows"].append(
        asdict(compare_baseline.Result(name="FP8", micro_batch=8, seconds=[], failure="no memory"))
    )
    put(tmp_path, "2026-01-02-h100-compare-wide.json", said | SOURCE)
    assert "| FP8 | 8 | no memory |  |  |  |" in performance_page.page(tmp_path)


def test_host_and_kernels(tmp_path: Path) -> None:
    both = {"forward": [0.5, 0.010], "both": [0.040, 0.9]}
    forms = bench_host.summary(dict.fromkeys(bench_host.FORMS, both))
    put(tmp_path, "2026-01-02-cpu-host.json", {"layers": 24, "dual_layers": 13, "rounds": 40, "forms": forms})
    row = {"name": "adaln forward", "form": "fused", "launches": 1, "bytes": 3 * 10**8}
    times = {"device_seconds": 1e-4, "host_seconds": 5e-5}
    rows = [row | times, row | times | {"form": "eager", "host_seconds": None}]
    put(tmp_path, "2026-01-02-gpu-kernels.json", {"copy_bandwidth": 3.75e12, "rows": rows})
    page = performance_page.page(tmp_path)
    assert "| fused | 10.0 (1.00) | 40.0 (1.00) |" in page
    assert "| adaln forward | fused | 100.0 | 50 | 3000 | 80 % |" in page
    assert "| adaln forward | eager | 100.0 |  | 3000 | 80 % |" in page


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_profile(tmp_path: Path, on_gpu: bool) -> None:
    """Its form is what tools/profile_step.py writes (test_profile_step.py)."""
    phase = {"host": 0.3, "process": 0.2, "calls": 4} | ({"device": 0.28} if on_gpu else {})
    said = {
        "recipe": "a.yaml",
        "layout": {"TP": 1, "PP": 2, "VPP": 1, "CP": 1, "DP": 1},
        "median_seconds": 0.6,
        "work": {"tflops_per_process": 356.1, "mfu": 0.36 if on_gpu else None},
        "gpu_busy": 0.95 if on_gpu else None,
        "overhead": {"clock": 0.012, "processor": 0.011},
        "ranks": [{"phases": {"learn/forward": phase}, "sums": {"host": 0.6, "device": 0.7}}],
        "bubble": {"learn": {"micro_batches": 4, "measured": 0.25, "ideal": 0.2}},
    }
    put(tmp_path, "2026-01-02-h100-profile.json", said)
    page = performance_page.page(tmp_path)
    assert "a step takes 600.0 ms, 356.1 TFLOP/s" in page
    assert ("MFU 36 %, GPU busy 95 %, " in page) == on_gpu
    summed = 700.0 if on_gpu else 600.0
    assert (
        f"recording it added 1 %. The phases are those of the recorded steps, and add up to {summed} ms."
        in page
    )
    assert (
        "| learn/forward | 300.0 | 280.0 | 40 % |" if on_gpu else "| learn/forward | 300.0 | 50 % |"
    ) in page
    said["collection"] = {"steps_between": 4, "seconds": 1.5}
    put(tmp_path, "2026-01-02-h100-profile.json", said)
    words = "added 1 %, the samples of 4 steps are collected in 1500.0 ms before them."
    assert words in performance_page.page(tmp_path)
    assert "stands still for 25 % of the pass; the ideal bubble of 4 micro-batches is 20 %" in page
