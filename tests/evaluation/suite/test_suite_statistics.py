"""Scores and their errors: against closed forms, and paired over prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import write_suite

from soar_mega.evaluation.suite.one_model import PICTURES
from soar_mega.evaluation.suite.prompt_sets import read_prompt_set
from soar_mega.evaluation.suite.score_errors import Bootstrap, Resampled, between_runs
from soar_mega.evaluation.suite.store import Values
from soar_mega.evaluation.suite.suite_settings import Suite, load_suite
from soar_mega.evaluation.suite.tables import Measured, Tables
from soar_mega.flow.noise import uniform


def _outcomes(values: torch.Tensor, counts: int = 1) -> np.ndarray:
    return np.stack([counts * values.double().numpy(), np.full(len(values), counts)], axis=1)


def test_the_error_of_a_share_is_the_binomial_one() -> None:
    draws = uniform(0, "test", torch.arange(400))[:, 0]
    right = _outcomes(draws < 0.3)
    share = right[:, 0].mean()
    found = Bootstrap([""] * 400).score(right)
    expected = (share * (1 - share) / 400) ** 0.5
    assert found.value == pytest.approx(share) and found.standard_error == pytest.approx(expected, rel=0.05)
    assert found.low == pytest.approx(share - 1.96 * expected, abs=0.2 * expected)
    assert found.high == pytest.approx(share + 1.96 * expected, abs=0.2 * expected)


def test_differences_are_paired() -> None:
    """What two models have in common cancels: the error is that of the difference, not of the two scores."""
    common = uniform(0, "common", torch.arange(300))[:, 0]
    gain = 0.1 * uniform(0, "gain", torch.arange(300))[:, 0]
    bootstrap = Bootstrap([""] * 300)
    found = bootstrap.difference(_outcomes(common), _outcomes(common + gain))
    assert found.value == pytest.approx(float(gain.mean()))
    assert found.standard_error == pytest.approx(float(gain.std(correction=0)) / 300**0.5, rel=0.05)
    assert found.standard_error < 0.2 * bootstrap.score(_outcomes(common)).standard_error
    same = bootstrap.difference(_outcomes(common), _outcomes(common))
    assert same.value == same.standard_error == 0.0 and same.low <= 0.0 <= same.high


def test_the_score_is_the_mean_of_categories_and_prompts_keep_their_images() -> None:
    """Four images of a prompt are one piece of evidence; a category of few prompts counts as much as one of many."""
    categories = ["a"] * 30 + ["b"] * 10
    values = torch.cat([torch.ones(30), torch.arange(10) % 2])
    bootstrap = Bootstrap(categories)
    found = bootstrap.score(_outcomes(values, counts=4))
    assert found.value == pytest.approx((1.0 + 0.5) / 2)
    assert found.standard_error == pytest.approx(0.5 * (0.25 / 10) ** 0.5, rel=0.05)
    alone = bootstrap.score(_outcomes(values, counts=4), "b")
    assert (
        alone.value == 0.5 and alone.prompts == 10 and alone.standard_error == pytest.approx(0.158, rel=0.05)
    )


def test_runs_of_one_arm_have_the_error_between_them() -> None:
    found = between_runs([1.0, 2.0, 3.0])
    assert found.value == 2.0 and found.standard_error == pytest.approx(1 / 3**0.5)
    assert found.high - 2.0 == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_noises_and_halves_follow_from_the_text_of_a_prompt(tmp_path: Path) -> None:
    write_suite(tmp_path)
    (tmp_path / "numbers.txt").write_text(
        'the number "345"\nthe number "12"\nthe number "6"\nthe number "12"\n'
    )
    sets = load_suite(str(tmp_path / "suite.yaml")).sets
    prompts = read_prompt_set(sets[1])
    assert [item.noises for item in prompts.items] == [1, 2, 1] and len(prompts.tasks) == 4
    (tmp_path / "numbers.txt").write_text('the number "12"\n')
    [alone] = read_prompt_set(sets[1]).items
    twin = prompts.items[1]
    assert (alone.key, alone.position, alone.half) == (twin.key, twin.position, twin.half)
    assert len({item.position for item in prompts.items}) == 3


def _tables(folder: Path, scores: dict[str, dict[float, list[float]]]) -> Tables:
    """Tables over made-up models: per guidance scale the value of each of 40 prompts."""
    folder.mkdir(exist_ok=True)
    sets = {"numbers": {"prompts": "numbers.txt", "scorers": ["x"]}}
    suite: Suite = load_suite(str(write_suite(folder, sets=sets, guidance_scale=[3, 1])))
    (folder / "numbers.txt").write_text("".join(f'the number "{i}"\n' for i in range(40)))
    [numbers] = [read_prompt_set(each) for each in suite.sets]

    def values(each: list[float]) -> dict[str, dict[str, Values]]:
        pictures = {task.name: {"black": 0.0, "NaN": 0.0} for task in numbers.tasks}
        return {PICTURES: pictures, "x": {t.name: {"x": v} for t, v in zip(numbers.tasks, each, strict=True)}}

    models = [
        Measured(
            name=name,
            path=name,
            images={},
            values={(point, "numbers"): values(by_scale[point.guidance_scale]) for point in suite.points},
        )
        for name, by_scale in scores.items()
    ]
    return Tables(suite=suite, sets=[numbers], models=models)


def test_the_best_scale_is_chosen_on_other_prompts_than_it_is_scored_on(tmp_path: Path) -> None:
    """A scale that wins on the reporting half alone is not the one that is reported."""
    probe = _tables(tmp_path / "probe", {"m": {3.0: [0.0] * 40, 1.0: [0.0] * 40}})
    halves = [item.half for item in probe.sets[0].items]
    assert 10 < sum(halves) < 30
    at_3 = [0.6 if half == 0 else 0.1 for half in halves]
    at_1 = [0.5 if half == 0 else 0.9 for half in halves]
    [row] = _tables(tmp_path / "x", {"m": {3.0: at_3, 1.0: at_1}}).best_of_sweep()
    assert row["guidance_scale"] == 3.0 and row["score"] == pytest.approx(0.1)


def test_a_report_resamples_no_model_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the next report over more checkpoints of a run, which compares each with each."""
    calls: list[object] = []
    real = Bootstrap.resampled

    def counted(bootstrap: Bootstrap, *arguments: Any) -> Resampled:
        calls.append(arguments)
        return real(bootstrap, *arguments)

    monkeypatch.setattr(Bootstrap, "resampled", counted)
    flat = {f"iter_{i}": {3.0: [0.1 * i] * 40, 1.0: [0.0] * 40} for i in range(4)}
    tables = _tables(tmp_path, flat)
    whole = tables.report()
    # two points, at both the choosing half, at the best the reporting half
    assert len(calls) == 4 * (2 + 2 + 1)
    replace(tables, models=tables.models[:2]).report()
    assert replace(tables).report() == whole and len(calls) == 4 * 5


def test_arms_and_pairs(tmp_path: Path) -> None:
    flat = {name: {3.0: [value] * 40, 1.0: [0.0] * 40} for name, value in (("a", 1), ("b#1", 2), ("b#2", 4))}
    report = _tables(tmp_path, flat).report()
    [arm] = [row for row in report["arms"] if row["guidance_scale"] == 3.0]
    assert (arm["arm"], arm["runs"], arm["score"], arm["standard_error"]) == ("b", 2, 3.0, 1.0)
    pairs = {
        (r["model"], r["minus"]): r["score"] for r in report["differences"] if r["guidance_scale"] == 3.0
    }
    assert pairs == {("b#1", "a"): 1.0, ("b#2", "a"): 3.0, ("b#2", "b#1"): 2.0}
