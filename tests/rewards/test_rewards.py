"""Rewards by name: their values, their sum, and what happens to a sample that cannot be judged."""

import importlib.util
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from soar_mega.evaluation.scorers.tiny import write_tiny_weights
from soar_mega.examples.digits.benchmark import CATEGORIES, OCR, benchmark_prompts, real_canvases, score
from soar_mega.examples.digits.canvases import KINDS, draw_caption
from soar_mega.examples.digits.scorer import DigitsScorer, asked_by_metadata, asked_by_prompt
from soar_mega.rewards import Rewards, make_rewards, make_scorer

NOTHING: dict[str, Any] = {}


# -- functions that the tests name as module:function


def mean_red(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def two(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "length": np.array([len(prompt) for prompt in prompts]),
        "weight": [m["weight"] for m in metadata],
    }


def one_too_many(images: Tensor, *_: object) -> list[float]:
    return [0.0] * (len(images) + 1)


def column(images: Tensor, *_: object) -> Tensor:
    return images.new_zeros(len(images), 1)


def words(images: Tensor, *_: object) -> list[str]:
    return ["good"] * len(images)


def endless(images: Tensor, *_: object) -> list[int]:
    return [10**400] * len(images)


def as_flow_grpo(images: Tensor, *_: object) -> tuple[Tensor, dict[str, Any]]:
    return images.new_zeros(len(images)), {}


def not_finite(images: Tensor, prompts: Sequence[str], _: object) -> list[float]:
    return [float(prompt) for prompt in prompts]


def among_others(images: Tensor, *_: object) -> Tensor:
    red = images[:, 0].mean(dim=(1, 2))
    return red - red.mean()


def broken(*_: object) -> Tensor:
    raise RuntimeError("out of paint")


class Green:
    """As `Scorer` says."""

    name, version, weights_hash = "green", "1", ""

    def score(self, images: Tensor, *_: object) -> dict[str, Tensor]:
        return {"green": images[:, 1].mean(dim=(1, 2)).double()}


class NoValues:
    name, version, weights_hash = "no_values", "1", ""

    def score(self, images: Tensor, *_: object) -> None:
        return None


class NoScorer:
    name = "none"


class Asks:
    def __init__(self, much: int) -> None: ...


HERE = f"{__name__}:"


def pictures(count: int, size: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((count, 3, size, size), dtype=np.float32))


def score_alone(rewards: Rewards, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    each = [
        rewards.score(images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])["total"]
        for i in range(len(images))
    ]
    return torch.cat(each)


# -- values


def test_the_total_is_the_weighted_sum() -> None:
    rewards = make_rewards({HERE + "mean_red": 2.0, HERE + "two#length": -0.5, HERE + "two#weight": 1})
    assert rewards.names == ("mean_red", "length", "weight")
    images, prompts, metadata = pictures(3), ["a", "bbb", "cc"], [{"weight": w} for w in (1, 2, 3.5)]
    values = rewards.score(images, prompts, metadata)
    assert list(values) == ["mean_red", "length", "weight", "total"]
    assert all(value.dtype == torch.float64 and value.shape == (3,) for value in values.values())
    expected = (
        2 * images[:, 0].mean(dim=(1, 2)).double()
        - 0.5 * torch.tensor([1.0, 3, 2])
        + torch.tensor([1, 2, 3.5])
    )
    torch.testing.assert_close(values["total"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", ["mean_red", "two#length", "two#weight"])  # a tensor, an array and a list
def test_a_function_of_the_users_own_is_a_scorer(key: str) -> None:
    """As a suite of an evaluation needs it, which takes what `score` gives as it is."""
    scorer = make_scorer(HERE + key)
    values = scorer.score(pictures(2), ["a", "bbb"], [{"weight": 1}, {"weight": 2.5}])[scorer.name]
    assert isinstance(values, Tensor) and values.dtype == torch.float64 and values.shape == (2,)


def test_a_class_of_the_users_own_is_a_reward() -> None:
    rewards, images = make_rewards({HERE + "Green": 3.0}), pictures(2)
    assert rewards.names == ("green",)
    values = rewards.score(images, ["a"] * 2, [NOTHING] * 2)
    assert torch.equal(values["total"], 3 * images[:, 1].mean(dim=(1, 2)).double())


def test_a_reward_of_weight_0_is_only_looked_at() -> None:
    rewards = make_rewards({HERE + "mean_red": 2.0, HERE + "not_finite": 0.0})
    values = rewards.score(pictures(2), ["1", "nan"], [NOTHING] * 2)
    assert torch.equal(values["total"], 2 * values["mean_red"]) and values["not_finite"].isnan().any()


def test_published_scorers_are_rewards(tmp_path: Path) -> None:
    write_tiny_weights("clip_score", tmp_path)
    values = make_rewards({"clip_score": 2.0}, tmp_path).score(pictures(2), ["a fox", "a box"], [NOTHING] * 2)
    assert torch.equal(values["total"], 2 * values["clip_score"]) and values["total"].isfinite().all()


def test_digits_agree_with_the_benchmark() -> None:
    prompts = benchmark_prompts(8)
    canvases = real_canvases(prompts)
    canvases[::3] = canvases[1::3][: len(canvases[::3])]  # a third shows what another prompt asks for
    result = score(canvases, prompts)
    rewards, images = make_rewards({"digits": 1.0}), torch.from_numpy(canvases)
    values = rewards.score(images, [p.text for p in prompts], [NOTHING] * len(prompts))["digits"]
    for kind in CATEGORIES:
        mine = values[[i for i, p in enumerate(prompts) if p.kind == kind]]
        assert mine.mean() == pytest.approx(result.categories[kind].mean) and 0 < mine.mean() < 1
    mine = values[[i for i, p in enumerate(prompts) if p.kind == OCR]]
    assert mine.mean() == pytest.approx(result.ocr.mean) and ((mine > 0) & (mine < 1)).any()
    assert torch.equal(
        score_alone(rewards, images, [p.text for p in prompts], [NOTHING] * len(prompts)), values
    )


def test_digits_read_any_prompt_of_the_canvases() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for caption in (draw_caption(rng, kind) for _ in range(100)):
            assert asked_by_prompt(caption.text) == caption


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a 3", {"tag": "single_object", "include": [{"class": "3", "count": 1}]}),
        ("a 3 and an 8", {"tag": "two_object", "include": [{"class": "3"}, {"class": "8"}]}),
        ("three 4s", {"tag": "counting", "include": [{"class": "4", "count": 3}], "exclude": []}),
        ("a red 0", {"tag": "colors", "include": [{"class": "0", "count": 1, "color": "red"}]}),
        (
            "a 1 left of a 2",
            {"tag": "position", "include": [{"class": "2"}, {"class": "1", "position": ["left of", 0]}]},
        ),
        (
            "a blue 1 and a white 2",
            {"tag": "color_attr", "include": [{"class": 1, "color": "blue"}, {"class": 2, "color": "white"}]},
        ),
    ],
)
def test_digits_read_geneval_lines(prompt: str, metadata: dict[str, Any]) -> None:
    assert asked_by_metadata(metadata, prompt) == asked_by_prompt(prompt)


@pytest.mark.parametrize(
    ("prompt", "metadata", "why"),
    [
        ("a fox", {}, "'a fox' is none that digits can judge"),
        ("a red 3 and a 5", {}, "none that digits can judge"),
        ("a fox", {"tag": "single_object", "include": [{"class": "fox"}]}, "the class 'fox' is no digit"),
        ("x", {"tag": "counting", "include": "3"}, "not as GenEval's"),
        ("x", {"include": [{"class": "3"}]}, "not as GenEval's"),
        (
            "x",
            {"tag": "two_object", "include": [{"class": "1", "count": 2}, {"class": "3"}]},
            "no canvas shows",
        ),
        ("x", {"tag": "single_object", "include": []}, "no canvas shows"),
        (
            "x",
            {"tag": "position", "include": [{"class": "1"}, {"class": "3", "position": ["near", 0]}]},
            "position ['near', 0]",
        ),
    ],
)
def test_a_prompt_that_digits_cannot_judge_is_named(prompt: str, metadata: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError) as error:
        DigitsScorer().score(torch.zeros(1, 3, 16, 16), [prompt], [metadata])
    assert why in str(error.value)


def test_jpeg_sizes_are_pillows() -> None:
    images = torch.cat([pictures(2, 24), torch.full((1, 3, 24, 24), 0.3)])
    expected = []
    for image in images:
        file = BytesIO()
        pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    rewards = make_rewards({"jpeg_incompressibility": 1.0, "jpeg_compressibility": 1.0})
    values = rewards.score(images, [""] * 3, [NOTHING] * 3)
    assert values["jpeg_incompressibility"].tolist() == expected
    assert values["jpeg_compressibility"].tolist() == [-size / 500 for size in expected]
    assert expected[0] > expected[2]


def test_a_prompt_is_checked_by_the_rewards_that_count() -> None:
    make_rewards({"digits": 1.0, HERE + "mean_red": 1.0}).check("a 3", NOTHING)
    make_rewards({"digits": 0, HERE + "mean_red": 1.0}).check("a fox", NOTHING)
    with pytest.raises(ValueError, match="'a fox' is none that digits can judge"):
        make_rewards({"digits": 1.0}).check("a fox", NOTHING)


# -- samples that cannot be judged


def test_one_bad_sample_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    prompts, images = ["a 3", "a fox", "a 5"], torch.from_numpy(real_canvases(benchmark_prompts(2)))[:3]
    rewards = make_rewards({"digits": 1.0, "jpeg_incompressibility": 1.0})
    values = rewards.score(images, prompts, [NOTHING] * 3)
    assert values["digits"].isnan().tolist() == values["total"].isnan().tolist() == [False, True, False]
    assert values["jpeg_incompressibility"].isfinite().all()
    rewards.score(images, prompts, [NOTHING] * 3)
    assert (
        "digits could not judge 1 of 3 samples, which are left out of learning (2 so far): the prompt 'a fox'"
        in (caplog.messages[-1])
    )


def test_an_image_or_a_value_that_is_not_finite_is_not_learned_from(caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(4)
    images[1, 2, 3, 4] = math.nan
    values = make_rewards({HERE + "not_finite": 1.0}).score(images, ["1", "2", "inf", "nan"], [NOTHING] * 4)
    assert values["total"].isnan().tolist() == [False, True, True, True]
    assert "3 of 4" in caplog.text and "the image is not finite" in caplog.text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one_too_many", "values of shape [4] for 3 images"),
        ("column", "values of shape [3, 1] for 3 images"),
        ("words", "gave ['good', 'good', 'good']: one number for each image"),
        ("as_flow_grpo", "gave (tensor("),
        ("endless", "gave [1000"),
        ("NoValues", "gave None, and no values by name"),
        ("two", "gives the values ['length', 'weight']: choose one as"),
        ("two#height", "gives the values ['length', 'weight']: choose one as"),
    ],
)
def test_a_reward_that_gives_something_else_ends_the_run(name: str, why: str) -> None:
    with pytest.raises(ValueError) as error:
        make_rewards({HERE + name: 1.0}).score(pictures(3), ["a"] * 3, [{"weight": 1}] * 3)
    assert why in str(error.value)


def test_a_collection_that_teaches_nothing_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    rewards = make_rewards({HERE + "mean_red": 1.0, HERE + "broken": 1.0})
    values = rewards.score(pictures(1).expand(3, -1, -1, -1), ["a"] * 3, [NOTHING] * 3)
    with pytest.raises(ValueError, match="reward broken could not judge one of the 3 samples.*out of paint"):
        rewards.examine(values)
    looked_at = make_rewards({HERE + "mean_red": 1.0, HERE + "broken": 0.0})
    values = looked_at.score(pictures(3), ["a"] * 3, [NOTHING] * 3)
    looked_at.examine(values)  # a reward of weight 0 ends nothing
    assert "reward mean_red is" in caplog.text and "nothing to learn from it (so far in 1 coll" in caplog.text


def test_rewards_that_judge_no_sample_in_common_end_the_run() -> None:
    """Each judges some of them: no sample has a total, and a report over none could not be written."""
    rewards = make_rewards({HERE + "not_finite": 1.0, HERE + "two#weight": 1.0})
    values = rewards.score(pictures(3), ["1", "nan", "2"], [{"weight": w} for w in (math.nan, 1, math.inf)])
    with pytest.raises(
        ValueError, match="none of the 3 samples .* by all rewards .*not_finite: its value is nan"
    ):
        rewards.examine(values)


def test_a_reward_that_depends_on_the_batch_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("mean_red", "among_others"):
        rewards = make_rewards({HERE + name: 1.0})
        for _ in range(2):
            rewards.score(pictures(2), ["a", "b"], [NOTHING] * 2)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(" by itself")[0] for message in warnings] == [
        "reward among_others gives a sample 0"
    ]


# -- names


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({}, "stage.rewards is empty"),
        ({"digitz": 1.0}, "no reward 'digitz': choose one of digits, jpeg_compressibility"),
        ({"digits": math.nan}, "the weight of digits is nan"),
        ({"digits": "much"}, "the weight of digits is 'much'"),
        ({"digits": 0.0}, "every weight of digits is 0"),
        ({"clip_score": 1.0}, "the scorer clip_score lacks"),
        ({HERE + "two#digits": 1.0, "digits": 1.0}, "digits is called digits, as another reward is"),
        ({"no_such_module_xyz:fn": 1.0}, "PYTHONPATH"),
        ({HERE + "three": 1.0}, "has no function or class three"),
        ({HERE + "Green#red": 1.0}, "#NAME goes with a function"),
        ({HERE + "NoScorer": 1.0}, "a class without version, weights_hash, score"),
        ({HERE + "Asks": 1.0}, "cannot be made without arguments"),
        ({"broken_reward:fn": 1.0}, "cannot be imported: ZeroDivisionError"),
    ],
)
def test_rewards_that_cannot_be_made_are_named(
    weights: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        make_rewards(weights)
    assert why in str(error.value)
    sys.modules.pop("broken_reward", None)


def test_digits_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scikit-learn is not installed."""
    from soar_mega.cli.doctor import scorers

    for name in [name for name in sys.modules if name.startswith("soar_mega.examples")]:
        monkeypatch.delitem(sys.modules, name)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else found(name))
    with pytest.raises(ValueError, match=r"pip install 'soar_mega\[digits\]'$"):
        make_rewards({"digits": 1.0})
    [line] = [line for line in scorers("") if line.startswith("digits")]
    assert "not usable: lacks" in line and "pip install 'soar_mega[digits]'" in line


def test_what_judges_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_rewards({"jpeg_compressibility": 0.5})
    assert "reward jpeg_compressibility (quality 95, libjpeg" in caplog.text and "x 0.5" in caplog.text
