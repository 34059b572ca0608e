import dataclasses

import numpy as np
import pytest
import torch

from soar_mega.evaluation.text_share import edit_distance
from soar_mega.examples.digits.benchmark import (
    CATEGORIES,
    benchmark_prompts,
    fulfils,
    read_back,
    real_canvases,
    score,
)
from soar_mega.examples.digits.canvases import Caption


def caption(digits, **fields):
    return Caption(kind="any", text="", digits=digits, **fields)


A, B = ("red", 3), ("green", 7)


@pytest.mark.parametrize(
    ("prompt", "cells", "right"),
    [
        (caption((3,)), (A, B, None, None), True),
        (caption((3,)), (B, None, None, None), False),
        (caption((3, 7)), (A, None, None, B), True),
        (caption((3, 7)), (A, A, None, None), False),
        (caption((3,), count=2), (A, A, None, B), True),
        (caption((3,), count=2), (A, A, A, None), False),
        (caption((3,), count=2), (A, None, None, None), False),
        (caption((3,), colours=("red",)), (A, None, None, None), True),
        (caption((3,), colours=("red",)), (("blue", 3), ("red", 4), None, None), False),
        (caption((3, 7), colours=("red", "green")), (B, A, None, None), True),
        (caption((3, 7), colours=("red", "green")), (("green", 3), ("red", 7), None, None), False),
        (caption((3, 7), relation="left of"), (A, B, None, None), True),
        (caption((3, 7), relation="left of"), (A, None, None, B), True),
        (caption((3, 7), relation="left of"), (B, A, None, None), False),
        (caption((3, 7), relation="left of"), (A, None, B, None), False),
        (caption((3, 7), relation="right of"), (B, A, None, None), True),
        (caption((3, 7), relation="above"), (A, None, B, None), True),
        (caption((3, 7), relation="above"), (A, B, None, None), False),
        (caption((3, 7), relation="below"), (B, None, A, None), True),
        (caption((3, 7), relation="below"), (A, None, B, None), False),
        (caption((3, 7), colours=("red", "green"), relation="left of"), (("blue", 3), B, None, None), False),
    ],
)
def test_rules(prompt, cells, right):
    assert fulfils(prompt, cells) is right


@pytest.mark.parametrize(
    ("cells", "points"),
    [
        ((A, B, A, None), 1.0),  # 373
        ((A, B, A, A), 1.0),  # 3733 contains it
        ((A, A, A, None), 2 / 3),  # one substitution
        ((A, None, None, B), 2 / 3),  # 37: one insertion
        ((None, None, None, None), 0.0),
        ((("red", 9),) * 4, 0.0),  # four wrong characters cost no more than the length
    ],
)
def test_ocr(cells, points):
    assert read_back(caption((3, 7, 3)), cells) == pytest.approx(points)


@pytest.mark.parametrize(
    ("a", "b", "d"),
    [("", "", 0), ("12", "", 2), ("kitten", "sitting", 3), ("1234", "2341", 2), ("17", "71", 2)],
)
def test_edit_distance(a, b, d):
    assert edit_distance(a, b) == edit_distance(b, a) == d


def test_prompts_are_a_fixed_list():
    prompts = benchmark_prompts(10)
    assert prompts == benchmark_prompts(10) != benchmark_prompts(10, seed=1)
    assert [p.kind for p in prompts] == [kind for kind in (*CATEGORIES, "ocr") for _ in range(10)]


def test_real_canvases_score_high_and_mismatched_ones_low():
    prompts = benchmark_prompts(40)
    real = real_canvases(prompts)
    result = score(torch.from_numpy(real), prompts)
    assert result.overall.mean > 0.95 and result.ocr.mean > 0.95
    assert min(category.mean for category in result.categories.values()) > 0.9
    shuffled = score(real[np.random.default_rng(0).permutation(len(real))], prompts)
    assert shuffled.overall.mean < 0.15


def test_overall_is_the_mean_of_six_categories_with_its_error():
    prompts = benchmark_prompts(8)
    real = real_canvases(prompts)
    # Half of "two_object" and all of OCR are spoilt.
    spoilt = [
        kind == "ocr" or (kind == "two_object" and i % 2 == 0)
        for i, kind in enumerate(p.kind for p in prompts)
    ]
    clean, result = (
        score(real, prompts),
        score(np.where(np.array(spoilt)[:, None, None, None], 0, real), prompts),
    )
    two = result.categories["two_object"]
    assert clean.categories["two_object"].mean == 1.0
    assert (two.mean, two.count) == (0.5, 8)
    assert two.standard_error == pytest.approx(np.sqrt(0.25 / 7))  # unbiased sample variance over n
    assert result.overall.mean == pytest.approx(clean.overall.mean - 0.5 / 6)
    others = sum(s.standard_error**2 for kind, s in result.categories.items())
    assert result.overall.standard_error == pytest.approx(np.sqrt(others) / 6)
    assert result.overall.count == 48 and result.ocr.mean == 0.0


def test_bad_input():
    prompts = benchmark_prompts(2)
    real = real_canvases(prompts)
    with pytest.raises(ValueError, match="got 13 images, 14 prompts"):
        score(real[1:], prompts)
    with pytest.raises(ValueError, match="at least 2 prompts of 'ocr', got 0"):
        score(real[:12], prompts[:12])
    with pytest.raises(ValueError, match="which the benchmark does not score"):
        score(real, [dataclasses.replace(prompts[0], kind="color_position"), *prompts[1:]])
    with pytest.raises(ValueError, match="at least 2 prompts per category"):
        benchmark_prompts(1)
