"""The report: what it says about noise, and that it holds everything it shows."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report.findings import findings
from report.noise import difference, paired_difference
from report.page import write_report

ARMS = ("base", "sft", "sft_multi", "soar")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "ocr")


def score(mean: float, error: float = 0.02) -> dict[str, Any]:
    return {"overall": {"mean": mean, "count": 360, "standard_error": error}} | {
        name: {"mean": mean, "count": 60, "standard_error": 0.06} for name in CATEGORIES
    }


def make_metrics(soar_score: float = 0.70, soar_drift: float = 1.7) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=64)
    means = dict(zip(ARMS, (0.45, 0.68, 0.69, soar_score), strict=True))
    drifts = dict(zip(ARMS, (1.9, 1.95, 1.96, soar_drift), strict=True))

    def pipeline(arm: str) -> dict[str, Any]:
        errors = drifts[arm] + 0.5 * noise + 0.02 * rng.normal(size=64)
        span = {"from": 0.9, "to": 0.65, "absolute": float(errors.mean()),
                "standard_error": 0.06, "relative": 1.3,
                "errors": errors.tolist()}  # fmt: skip
        guidance = {
            scale: {"benchmark": score(means[arm]), "energy_distance": {"value": 0.2, "standard_error": 0.03}}
            for scale in ("1", "3")
        }
        return {
            "guidance": guidance,
            "drift": {"steps": 5, "samples": 64, "scales": {"1": [span], "3": [span]}},
        }

    run = {
        "iterations": 300,
        "batch_size": 64,
        "points": 3,
        "forwards": 11,
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "losses": {"base": [(10, 1.0), (20, 0.9)], "aux": []},
    }
    return {
        "pipelines": {arm: pipeline(arm) for arm in ARMS},
        "real": {"verifier_accuracy": 0.98, "benchmark": score(0.97)},
        "demo": {
            "sample_prompts": ["a red 3", "a <5> & more"],
            "guidance_scale": 3.0,
            "runs": dict.fromkeys(ARMS[1:], run),
            "seconds": {"sft": 100.0, "soar": 150.0},
            "export": {"folder": "runs/demo/soar/export", "drawn": "a picture"},
        },
    }


def test_independent_and_paired_differences() -> None:
    far = difference(0.5, 0.03, 0.7, 0.04)
    assert far.value == pytest.approx(0.2) and far.standard_error == pytest.approx(0.05)
    assert far.beyond_noise and "4.0 standard errors" in far.verdict()
    assert difference(0.5, 0.03, 0.59, 0.04).verdict() == "within noise"
    paired = paired_difference([1.0, 5.0, 9.0], [1.1, 5.3, 9.2])
    assert paired.value == pytest.approx(0.2) and paired.standard_error == pytest.approx(0.1 / 3**0.5)
    assert paired.threshold == pytest.approx(4.303, abs=1e-3)  # Student's t with two degrees of freedom
    assert not paired_difference([0.0] * 3, [1.0, 3.0, 2.0]).beyond_noise  # 3.5 standard errors
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([1.0, 2.0], [1.0])


def test_findings_follow_the_numbers() -> None:
    near, far = findings(make_metrics(soar_score=0.70)), findings(make_metrics(soar_score=0.85))
    assert "+0.02 \u00b1 0.03, within noise" in near[1]
    assert "+0.17 \u00b1 0.03, beyond noise" in far[1]
    drift = next(line for line in near if line.startswith("Exposure bias") and "control" in line)
    assert re.search(r"-1[23]\.\d% from noise 0.9 to 0.65 \[beyond noise", drift)
    same = next(
        line for line in findings(make_metrics(soar_drift=1.96)) if "drift" in line and "control" in line
    )
    assert "within noise" in same


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    samples = {}
    for arm in ARMS:
        samples[arm] = tmp_path / f"{arm}.png"
        Image.fromarray(np.zeros((32, 64, 3), dtype=np.uint8)).save(samples[arm])
    metrics = make_metrics()
    write_report(metrics, samples, tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    for line in findings(metrics):
        assert line.split(",")[0] in page
    assert "Without guidance" in page and "With guidance 3" in page and "0.98" not in page and "98.0%" in page


def test_samples_that_do_not_fit_the_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.zeros((33, 64, 3), dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match="x.png has 33 rows"):
        write_report(make_metrics(), dict.fromkeys(ARMS, path), tmp_path / "report.html")
