"""GenEval's decisions on recorded detections of every tag, its colours, and the scorer as a whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from soar_mega.evaluation.scorers import make_scorer
from soar_mega.evaluation.scorers.clip import read_clip
from soar_mega.evaluation.scorers.gen_eval import ColorReader, crop
from soar_mega.evaluation.scorers.gen_eval_rules import (
    COLORS,
    FAILURES,
    Found,
    check_metadata,
    judge,
    relations,
    share_met,
    sure_objects,
)
from soar_mega.evaluation.scorers.scorer_files import OPENAI_CLIP

NOWHERE = torch.zeros(1, 1, dtype=torch.bool)
# Recorded: class, box, score and, where it matters, the colour that was read.
Record = tuple[str, tuple[float, float, float, float], float, str]
BENCH: Record = ("bench", (100, 200, 300, 400), 0.62, "brown")
WEAK_BENCH: Record = ("bench", (10, 20, 30, 40), 0.3, "brown")
CATS: list[Record] = [("cat", (60.0 * i, 0, 60.0 * i + 50, 50), 0.99 - 0.03 * i, "black") for i in range(4)]
RED_APPLE: Record = ("apple", (0, 0, 90, 90), 0.5, "red")
GREEN_APPLE: Record = ("apple", (200, 0, 290, 90), 0.7, "green")
DOG: Record = ("dog", (0, 0, 100, 100), 0.8, "white")
LEFT_OF_DOG: Record = ("bird", (-250, 20, -190, 80), 0.8, "blue")


def demand(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def verdict(records: Sequence[Record], tag: str, *include: Mapping[str, Any], **more: Any) -> set[str]:
    """The kinds of failure, none where the image is correct."""
    metadata = {"tag": tag, "include": list(include), **more}
    check_metadata(metadata)
    found: dict[str, list[Found]] = {}
    colors = {}
    for name, box, score, color in records:
        item = Found(box, score, NOWHERE)
        found.setdefault(name, []).append(item)
        colors[id(item)] = color
    objects = sure_objects(found, tag)
    failures = judge(objects, metadata, lambda group, name: [colors[id(item)] for item in group]).failures
    assert {kind for kind, _ in failures} <= set(FAILURES)
    return {kind for kind, _ in failures}


def test_single_object() -> None:
    assert verdict([BENCH], "single_object", demand("bench")) == set()
    assert verdict([BENCH, BENCH, CATS[0]], "single_object", demand("bench")) == set()  # more is no failure
    assert verdict([CATS[0]], "single_object", demand("bench")) == {"missing"}
    assert verdict([WEAK_BENCH], "single_object", demand("bench")) == {"missing"}  # .3 is not above .3
    assert verdict([], "single_object", demand("bench")) == {"missing"}


def test_two_objects() -> None:
    both = demand("bench"), demand("cat")
    assert verdict([BENCH, CATS[0]], "two_object", *both) == set()
    assert verdict([BENCH], "two_object", *both) == {"missing"}


def test_counting_is_exact_by_exclude_and_asks_for_surer_objects() -> None:
    """The scores are .99, .96, .93 and .9, and the last is not above .9."""
    three = demand("cat", 3)
    no_more = {"exclude": [demand("cat", 4)]}
    assert verdict(CATS[:3], "counting", three, **no_more) == set()
    assert verdict(CATS[:2], "counting", three, **no_more) == {"missing"}
    assert verdict(CATS, "counting", three, **no_more) == set()
    assert verdict([*CATS, CATS[0]], "counting", three, **no_more) == {"excluded"}
    assert verdict(CATS, "two_object", three, **no_more) == {"excluded"}  # .9 is sure enough elsewhere
    assert verdict([CATS[0]] * 20, "counting", demand("cat", 17)) == {"missing"}  # 16 of a class at most


def test_colors_are_of_the_surest_objects() -> None:
    green, red = demand("apple", color="green"), demand("apple", color="red")
    assert verdict([RED_APPLE, GREEN_APPLE], "colors", green) == set()
    assert verdict([RED_APPLE, GREEN_APPLE], "colors", red) == {"color"}  # the surer one is green
    assert verdict([RED_APPLE], "colors", red) == set()
    assert verdict([RED_APPLE, GREEN_APPLE], "colors", demand("apple", 2, color="red")) == {"color"}
    assert verdict([], "colors", red) == {"missing"}


def test_color_attribution() -> None:
    asked = demand("apple", color="red"), demand("dog", color="black")
    assert verdict([RED_APPLE, DOG], "color_attr", *asked) == {"color"}
    assert verdict([RED_APPLE, (*DOG[:3], "black")], "color_attr", *asked) == set()
    assert verdict([GREEN_APPLE, ("apple", (0, 0, 9, 9), 0.2, "red")], "color_attr", asked[0]) == {"color"}


def test_position_is_relative_to_an_earlier_object() -> None:
    asked = demand("dog"), demand("bird", position=["left of", 0])
    assert verdict([DOG, LEFT_OF_DOG], "position", *asked) == set()
    assert verdict([DOG, ("bird", (150, 20, 210, 80), 0.8, "")], "position", *asked) == {"position"}
    assert verdict([LEFT_OF_DOG], "position", *asked) == {"missing", "position"}  # no target
    assert verdict([DOG], "position", *asked) == {"missing"}
    two = demand("dog", 2), demand("bird", position=["left of", 0])  # of all of them
    farther: Record = ("dog", (-400, 0, -300, 100), 0.7, "white")
    assert verdict([DOG, farther, LEFT_OF_DOG], "position", *two) == {"position"}


@pytest.mark.parametrize(
    "dx, dy, told",
    [
        (200, 0, {"right of"}),
        (-200, 0, {"left of"}),
        (0, 200, {"below"}),
        (0, -200, {"above"}),
        (150, 150, {"right of", "below"}),  # 130/212 = .61 on both axes
        (100, 40, {"right of"}),  # (100 - 20)/107.7 = .74 and (40 - 20)/107.7 = .19
        (20, 0, set()),  # a tenth of 100 + 100
        (21, 0, set()),  # (21 - 20)/21 = .05
        (40, 0, set()),  # (40 - 20)/40 = .5 is not above .5
        (41, 0, {"right of"}),  # 21/41 = .512
        (-41, 5, {"left of"}),  # 21/41.3 = .508
        (60, 60, set()),  # 40/84.9 = .47
        (0, 0, set()),
    ],
)
def test_a_relation_is_a_distance_that_the_sizes_do_not_explain(dx: float, dy: float, told: set[str]) -> None:
    a = Found((dx, dy, dx + 100, dy + 100), 1, NOWHERE)
    b = Found((0, 0, 100, 100), 1, NOWHERE)
    assert relations(a, b) == told


def test_the_share_that_is_trained_on() -> None:
    """The published reward: one part for a count, one for a colour, a wrong position gives a 0 and a 1."""

    def share(records: Sequence[Record], *include: Mapping[str, Any]) -> tuple[float, bool]:
        objects: dict[str, list[Found]] = {}
        for name, box, score, _ in records:
            objects.setdefault(name, []).append(Found(box, score, NOWHERE))
        metadata = {"tag": "position", "include": list(include)}
        return share_met(objects, metadata, lambda group, name: ["red"] * len(group))

    assert share([BENCH], demand("bench")) == (1, True)
    assert share(CATS, demand("cat", 3)) == (pytest.approx(2 / 3), False)  # one too many is one too few
    assert share(CATS, demand("cat", 1)) == (-2, False)
    assert share([RED_APPLE], demand("apple", color="red")) == (1, True)
    assert share([RED_APPLE], demand("apple", color="blue")) == (0.5, False)
    assert share([], demand("apple", color="red")) == (0, False)
    asked = demand("dog"), demand("bird", position=["left of", 0])
    assert share([DOG, LEFT_OF_DOG], *asked) == (1, True)
    assert share([DOG, ("bird", (150, 20, 210, 80), 0.8, "")], *asked) == (pytest.approx(3 / 4), False)
    assert share([LEFT_OF_DOG], *asked) == (pytest.approx(1 / 3), False)
    assert share([DOG], *asked) == (pytest.approx(1 / 3), False)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tag": "colour"}, "its tag must be one of single_object, two_object, .* not 'colour'"),
        ({"tag": None}, "its tag must be one of"),
        ({"include": []}, "it must say what to include"),
        ({"include": [demand("mouse")]}, "does not know the class 'mouse'"),
        ({"include": [demand("dog", 0)]}, "a count must be a whole number from 1, not 0"),
        ({"include": [demand("dog", color="teal")]}, "no color 'teal', only red, orange"),
        (
            {"include": [demand("dog", position=["left of", 0])]},
            "refers to an earlier one of include, not to 0",
        ),
        ({"include": [demand("dog"), demand("cat", position=["under", 0])]}, "a position is .left of"),
        ({"exclude": [demand("unicorn", 2)]}, "does not know the class 'unicorn'"),
    ],
)
def test_a_line_that_cannot_be_judged_is_refused(change: dict[str, Any], words: str) -> None:
    line = {"tag": "counting", "include": [demand("dog")], "prompt": "a photo of a dog"}
    check_metadata(line)
    with pytest.raises(ValueError, match=words) as told:
        check_metadata(line | change)
    assert "a photo of a dog" in str(told.value)


def picture() -> Image.Image:
    noise = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(4))
    return by_hand.eight_bits(noise)


def test_an_object_is_cut_out_alone_on_grey() -> None:
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[10:30, 20:50] = True
    mask[15, 25] = False
    cut = crop(picture(), Found((20, 10, 50, 30), 1, mask))
    assert cut.size == (30, 20)
    assert cut.getpixel((5, 5)) == (0x99, 0x99, 0x99)  # not of the object
    assert cut.getpixel((6, 5)) == picture().getpixel((26, 15))


@torch.inference_mode()
def test_a_color_is_that_of_the_nearest_phrases(weights_dir: Path) -> None:
    """Upright and lying crops, the margin of a torchvision crop, phrases normalized before and after their mean."""
    folder = weights_dir / OPENAI_CLIP
    reader = ColorReader(read_clip(folder, folder, torch.device("cpu")))
    clip = by_hand.Clip(load_file(folder / "model.safetensors"), by_hand.quick_gelu)
    phrases = []
    for color in COLORS:
        texts = (
            f"a photo of a {color} stop sign",
            f"a photo of a {color}-colored stop sign",
            f"a photo of a {color} object",
        )
        tokens = [reader.clip.tokenizer(text).input_ids for text in texts]
        phrases.append(by_hand.unit(torch.stack([clip.text(line) for line in tokens]).mean(0)))
    boxes = [
        (0, 0, 31, 20),
        (40, 1, 60, 59),
        (0, 0, 80, 60),
        (30, 30, 70, 50),
        (3, 4, 10, 60),
        (20, 0, 60, 12),
    ]
    everything = torch.ones(60, 80, dtype=torch.bool)
    expected = []
    for left, top, right, bottom in boxes:
        part = torch.frombuffer(
            bytearray(picture().crop((left, top, right, bottom)).tobytes()), dtype=torch.uint8
        )
        image = part.view(bottom - top, right - left, 3).permute(2, 0, 1) / 255
        height, width = image.shape[1:]
        small = (28, int(28 * height / width)) if width <= height else (int(28 * width / height), 28)
        resized = by_hand.resized_by_pil(image, *small)
        x, y = (round((edge - 28) / 2) for edge in small)
        feature = clip.image(by_hand.normalized(resized[:, y : y + 28, x : x + 28]))
        expected.append(COLORS[int(torch.stack([feature @ phrase for phrase in phrases]).argmax())])
    objects = [Found(box, 1, everything) for box in boxes]
    assert reader.read(picture(), objects, "stop sign") == expected


def test_the_scorer_judges_each_image_by_itself(weights_dir: Path, images: Tensor) -> None:
    line = {"tag": "colors", "include": [demand("refrigerator", color="red")]}
    scorer = make_scorer("gen_eval", weights_dir)
    together = scorer.score(images[:2], ["", ""], [line, line])
    assert [*together] == ["gen_eval", *(f"gen_eval/{kind}" for kind in FAILURES)]
    alone = scorer.score(images[1:2], [""], [line])
    assert all(torch.equal(alone[name], values[1:]) for name, values in together.items())
    assert [*make_scorer("gen_eval_rl", weights_dir).score(images[:0], [], [])] == [
        "gen_eval_rl",
        "gen_eval_rl/strict",
    ]
    with pytest.raises(ValueError, match="its tag must be one of"):
        scorer.score(images[:1], ["a dog"], [{}])
