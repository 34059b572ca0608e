"""The verifier of the built-in canvases as a scorer: whether an image shows the digits that its prompt asks for.

What is asked for is read from the metadata of the prompt, a line as GenEval's, or else from the words of the prompt.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.examples.digits.benchmark import OCR, judged
from soar_mega.examples.digits.canvases import COLOURS, COUNTS, RELATIONS, Caption
from soar_mega.examples.digits.verifier import Verifier

_NOUN = rf"an? (?:({'|'.join(COLOURS)}) )?([0-9])"
_OCR = re.compile(r'the number "([0-9]+)"')
_COUNTING = re.compile(rf"({'|'.join(COUNTS.values())}) ([0-9])s")
_OBJECTS = re.compile(rf"{_NOUN}(?: (and|{'|'.join(RELATIONS)}) {_NOUN})?")
KINDS = "'a red 3', 'a 3 and a 5', 'a 3 left of a 5', 'two 3s', 'the number \"123\"'"


class DigitsScorer:
    """1 where the canvas shows what is asked for, else 0; of a number to be read the share that can be (OCR)."""

    name = "digits"
    version = "1"
    weights_hash = ""

    def __init__(self) -> None:
        self._verifier = Verifier.fit()

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        wanted = [_asked(prompt, more) for prompt, more in zip(prompts, metadata, strict=True)]
        shown = self._verifier.read_all(images.cpu().numpy())
        values = [judged(caption, cells) for caption, cells in zip(wanted, shown, strict=True)]
        return {self.name: torch.tensor(values, dtype=torch.float64)}

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """See `Particular`."""
        _asked(prompt, metadata)


def _asked(prompt: str, metadata: Mapping[str, Any]) -> Caption:
    return asked_by_metadata(metadata, prompt) if "include" in metadata else asked_by_prompt(prompt)


def asked_by_prompt(prompt: str) -> Caption:
    """What the words of a prompt ask for. ValueError where they are not of a kind that the canvases have."""
    words = prompt.strip()
    if found := _OCR.fullmatch(words):
        return Caption(kind=OCR, text=prompt, digits=tuple(map(int, found[1])))
    if found := _COUNTING.fullmatch(words):
        count = next(count for count, word in COUNTS.items() if word == found[1])
        return Caption(kind="counting", text=prompt, digits=(int(found[2]),), count=count)
    found = _OBJECTS.fullmatch(words)
    if found is None or (found[3] and (found[1] is None) != (found[4] is None)):
        raise ValueError(f"the prompt {prompt!r} is none that digits can judge: as in {KINDS}")
    colours = tuple(colour for colour in (found[1], found[4]) if colour)
    if not found[3]:
        kind = "colors" if colours else "single_object"
        return Caption(kind=kind, text=prompt, digits=(int(found[2]),), colours=colours)
    digits = (int(found[2]), int(found[5]))
    if found[3] == "and":
        kind = "color_attr" if colours else "two_object"
        return Caption(kind=kind, text=prompt, digits=digits, colours=colours)
    kind = "color_position" if colours else "position"
    return Caption(kind=kind, text=prompt, digits=digits, colours=colours, relation=found[3])


def asked_by_metadata(metadata: Mapping[str, Any], prompt: str) -> Caption:
    """What a line of GenEval's form asks for, its classes being digits.

    {"tag", "include": [{"class": "3", "count": 1, "color": "red", "position": ["left of", 0]}]}: the position of an
    object is relative to the object before it. ValueError where the line is of another form.
    """
    try:
        objects = metadata["include"]
        digits = tuple(_digit(each["class"]) for each in objects)
        colours = tuple(str(each["color"]) for each in objects if "color" in each)
        counts = [int(each.get("count", 1)) for each in objects]
        relations = [each.get("position") for each in objects]
        kind = str(metadata["tag"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the metadata of the prompt {prompt!r} is not as GenEval's: {error!r}") from error
    if (
        len(digits) not in (1, 2)
        or not set(colours) <= set(COLOURS)
        or len(colours) not in (0, len(digits))
        or (counts[0] != 1 and len(digits) > 1)
        or any(count != 1 for count in counts[1:])
        or relations[0] is not None
    ):
        raise ValueError(f"the metadata of the prompt {prompt!r} asks for what no canvas shows: {objects!r}")
    if relations[-1] is None:
        return Caption(kind=kind, text=prompt, digits=digits, colours=colours, count=counts[0])
    if relations[-1] not in [[relation, 0] for relation in RELATIONS]:
        raise ValueError(
            f"the metadata of the prompt {prompt!r} has the position {relations[-1]!r}: "
            f"one of {', '.join(RELATIONS)} and 0 is expected"
        )
    relation = relations[-1][0]
    # GenEval places the second object, a caption of a canvas speaks of the first
    return Caption(kind=kind, text=prompt, digits=digits[::-1], colours=colours[::-1], relation=relation)


def _digit(name: Any) -> int:
    if str(name) not in map(str, range(10)):
        raise ValueError(f"the class {name!r} is no digit")
    return int(name)
