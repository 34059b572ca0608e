"""What GenEval calls a correct image: its rules on what a detector found, with the published thresholds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's classes in its order, by the names that GenEval's prompts have
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *(
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
    ),
    *(
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
    ),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book"),
    *("clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1
FAILURES = ("missing", "color", "position", "excluded")


@dataclass(frozen=True, eq=False)
class Found:
    """An object in an image.

    Attributes:
        box: left, top, right, bottom, pixels.
        score: how sure the detector is, in [0, 1].
        mask: [H, W] bool, the object's own pixels.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Tensor


Objects = Mapping[str, Sequence[Found]]
# the colour of each object of a class
ColorsOf = Callable[[Sequence[Found], str], Sequence[str]]


@dataclass(frozen=True)
class Verdict:
    """About one image.

    Attributes:
        failures: those of FAILURES that happened, with a sentence on each.
    """

    failures: tuple[tuple[str, str], ...]

    @property
    def correct(self) -> bool:
        return not self.failures


def sure_objects(found: Objects, tag: str) -> dict[str, list[Found]]:
    """Of each class those that count, the surest first; counting asks for surer ones."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {}
    for name, objects in found.items():
        # Of equals the later one comes first, as in the published script.
        sure = sorted((item for item in objects if item.score > threshold), key=lambda item: item.score)[::-1]
        if sure:
            kept[name] = sure[:MAX_OBJECTS]
    return kept


def relations(a: Found, b: Found) -> set[str]:
    """How `a` stands to `b`: a distance of centres that the sizes do not explain, within 60 degrees of an axis."""
    width = (a.box[2] - a.box[0]) + (b.box[2] - b.box[0])
    height = (a.box[3] - a.box[1]) + (b.box[3] - b.box[1])
    dx = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
    dy = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
    x = math.copysign(max(abs(dx) - POSITION_THRESHOLD * abs(width), 0), dx)
    y = math.copysign(max(abs(dy) - POSITION_THRESHOLD * abs(height), 0), dy)
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    distance = math.hypot(dx, dy)
    told = {
        "left of": x / distance < -0.5,
        "right of": x / distance > 0.5,
        "above": y / distance < -0.5,
        "below": y / distance > 0.5,
    }
    return {name for name, holds in told.items() if holds}


def judge(objects: Objects, metadata: Mapping[str, Any], colors_of: ColorsOf) -> Verdict:
    """Whether the surest objects of each demanded class are as many, of the colour and at the place demanded.

    Args:
        objects: from `sure_objects`.
        metadata: a line of GenEval that passed `check_metadata`.
    """
    failures: list[tuple[str, str]] = []
    groups: list[Sequence[Found] | None] = []  # of each demand, None where it is not met
    for demand in metadata["include"]:
        name, count = demand["class"], demand["count"]
        group = list(objects.get(name, ()))[:count]
        fault = _fault(group, demand, groups, colors_of)
        if fault:
            failures.append(fault)
        groups.append(None if fault else group)
    for demand in metadata.get("exclude", ()):
        name, count = demand["class"], demand["count"]
        number = len(objects.get(name, ()))
        if number >= count:
            failures.append(("excluded", f"expected {name}<{count}, found {number}"))
    return Verdict(tuple(failures))


def _fault(
    group: Sequence[Found],
    demand: Mapping[str, Any],
    groups: Sequence[Sequence[Found] | None],
    colors_of: ColorsOf,
) -> tuple[str, str] | None:
    name, count = demand["class"], demand["count"]
    if len(group) < count:
        return "missing", f"expected {name}>={count}, found {len(group)}"
    if "color" in demand:
        colors = list(colors_of(group, name))
        if colors.count(demand["color"]) < count:
            return "color", f"expected {demand['color']} {name}>={count}, found {', '.join(colors)}"
    if "position" in demand:
        relation, index = demand["position"]
        target = groups[index]
        if target is None:
            return "position", f"no target for {name} to be {relation}"
        for item in group:
            for other in target:
                if relation not in (told := relations(item, other)):
                    found = " and ".join(sorted(told)) or "no relation to"
                    return "position", f"expected {name} {relation} target, found {found} target"
    return None


def share_met(objects: Objects, metadata: Mapping[str, Any], colors_of: ColorsOf) -> tuple[float, bool]:
    """The reward that flow_grpo trains on: how far each demand is met, and whether all are met exactly.

    A count is wrong in both directions here, "exclude" is not read, and a wrong position costs half of its part: the
    published code gives 1 for it after the 0.
    """
    parts: list[float] = []
    groups: list[Sequence[Found] | None] = []
    strict = True
    for demand in metadata["include"]:
        name, count = demand["class"], demand["count"]
        group = list(objects.get(name, ()))
        parts.append(1 - abs(count - len(group)) / count)
        met = len(group) == count
        if not met and ("color" in demand or "position" in demand):
            parts.append(0.0)
        if met and "color" in demand:
            number = list(colors_of(group, name)).count(demand["color"])
            parts.append(1 - abs(count - number) / count)
            met = number == count
        if met and "position" in demand:
            relation, index = demand["position"]
            target = groups[index]
            met = target is not None and all(
                relation in relations(item, other) for item in group for other in target
            )
            parts += [] if met else [0.0]
            parts += [] if target is None else [1.0]
        groups.append(group if met else None)
        strict = strict and met
    return sum(parts) / len(parts), strict


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """ValueError where it is no line that GenEval can judge; says what is wrong."""
    line = f"the line {dict(metadata)!r} cannot be judged by GenEval: "
    if metadata.get("tag") not in TAGS:
        raise ValueError(f"{line}its tag must be one of {', '.join(TAGS)}, not {metadata.get('tag')!r}")
    if not metadata.get("include"):
        raise ValueError(f"{line}it must say what to include")
    for kind in ("include", "exclude"):
        for place, demand in enumerate(metadata.get(kind, ())):
            if demand.get("class") not in CLASSES:
                raise ValueError(f"{line}its detector does not know the class {demand.get('class')!r}")
            if not isinstance(demand.get("count"), int) or demand["count"] < 1:
                raise ValueError(f"{line}a count must be a whole number from 1, not {demand.get('count')!r}")
            if demand.get("color", COLORS[0]) not in COLORS:
                raise ValueError(f"{line}there is no color {demand['color']!r}, only {', '.join(COLORS)}")
            _check_position(demand.get("position"), place, line)


def _check_position(position: Any, place: int, line: str) -> None:
    if position is None:
        return
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f"{line}a position is [{' | '.join(RELATIONS)}, index], not {position!r}")
    if not isinstance(position[1], int) or not 0 <= position[1] < place:
        raise ValueError(f"{line}a position refers to an earlier one of include, not to {position[1]!r}")
