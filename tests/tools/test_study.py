"""The study: its arms, what it compares, and its picture."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from report.study_figure import study_figure
from study import Plan, Study, compare, plan_arms, read_measurements

FLOPS = {"sft": 300, "sft_multi": 900, "soar": 1100}


def test_longer_arms_have_the_computation_of_soar() -> None:
    arms = {arm.name: arm for arm in plan_arms(300, FLOPS)}
    assert [arms[name].iterations for name in ("sft", "sft_multi", "soar")] == [300, 300, 300]
    assert arms["sft_long"].iterations == 1100 and arms["sft_multi_long"].iterations == 367
    for name in ("sft_long", "sft_multi_long", "soar"):
        assert arms[name].work == pytest.approx(300, rel=2e-3)


def test_differences_are_paired_over_seeds() -> None:
    runs = {
        "sft": [{"score": 0.5}, {"score": 0.6}, {"score": 0.7}],
        "soar": [{"score": 0.61}, {"score": 0.7}, {"score": 0.79}],
    }
    found = compare(runs)
    assert list(found) == ["sft"]
    assert found["sft"]["score"]["value"] == pytest.approx(0.1)
    assert found["sft"]["score"]["beyond_noise"]  # although the seeds differ by more than the arms


def write_evaluation(path: Path, name: str, score: float) -> None:
    guidance = {
        scale: {
            "benchmark": {"overall": {"mean": score}, "ocr": {"mean": 0.5}},
            "energy_distance": {"value": 0.1},
        }
        for scale in ("1", "3")
    }
    spans = [{"from": 0.9, "to": 0.65, "absolute": 2.0 - score}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"pipelines": {name: {"guidance": guidance, "drift": {"scales": {"3": spans}}}}})
    )


def test_result_and_picture_of_finished_runs(tmp_path: Path) -> None:
    plan = Plan(seeds=(1, 2))
    study = Study(tmp_path, plan)
    study.arms = plan_arms(plan.iterations, FLOPS)
    write_evaluation(study.evaluated("base"), "base", 0.4)
    for i, arm in enumerate(study.arms):
        for seed in plan.seeds:
            write_evaluation(
                study.evaluated(f"{arm.name}-{seed}"), f"{arm.name}-{seed}", 0.5 + 0.01 * i * seed
            )
            run = tmp_path / f"{arm.name}-{seed}"
            run.mkdir()
            (run / "complete.json").write_text("{}")
            assert study.chain(arm, seed) == []  # nothing is left to do
    result = study.result(FLOPS)
    assert json.loads(json.dumps(result))["runs"]["soar"][1]["score"] == pytest.approx(0.54)
    assert Image.open(io.BytesIO(study_figure(result))).width > 800


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    study = Study(tmp_path, Plan())
    arm = plan_arms(300, FLOPS)[2]
    names = [command.name for command in study.chain(arm, 3)]
    assert names == ["soar-3", "evaluate-soar-3"]
    (tmp_path / "soar-3").mkdir()
    (tmp_path / "soar-3" / "complete.json").write_text("{}")
    assert [command.name for command in study.chain(arm, 3)] == ["evaluate-soar-3"]


def test_measurements_are_read_by_name(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "x.json", "x", 0.75)
    numbers = read_measurements(tmp_path / "x.json", "x")
    assert numbers["score"] == 0.75 and numbers["drift 0.9 to 0.65"] == 1.25
