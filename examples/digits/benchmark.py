"""The built-in benchmark: GenEval's six tasks and an OCR task on canvases of digits.

GenEval (Ghosh et al. 2023): an image is right if a detector finds what the prompt asks for; the score is the mean over
the six tasks of the share of right images. As there, objects that the prompt does not mention do no harm except when
counting. OCR as in Flow-GRPO, see text_share.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soar_mega.evaluation.text_share import share_read
from soar_mega.examples.digits.canvases import RELATIONS, Caption, Cell, draw_caption, place, render
from soar_mega.examples.digits.verifier import Verifier

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OCR = "ocr"


@dataclass(frozen=True, kw_only=True)
class Score:
    mean: float
    count: int
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores per category, and `overall`: the mean of the six categories, OCR apart, `count` being all their images."""

    categories: dict[str, Score]
    ocr: Score
    overall: Score


def benchmark_prompts(per_category: int = 60, seed: int = 0) -> list[Caption]:
    """The prompts, category by category with OCR last: 7 x per_category, a function of the arguments alone."""
    if per_category < 2:
        raise ValueError(f"the benchmark needs at least 2 prompts per category, got {per_category}")
    prompts = []
    for index, kind in enumerate((*CATEGORIES, OCR)):
        rng = np.random.default_rng([seed, index])
        prompts += [draw_caption(rng, kind) for _ in range(per_category)]
    return prompts


def real_canvases(prompts: Sequence[Caption], seed: int = 0, split: str = "held_out") -> NDArray[np.float32]:
    """One true canvas per prompt, drawn with scans that neither generator nor verifier knows: [N, 3, 16, 16]."""
    rng = np.random.default_rng([seed, len(prompts)])
    return np.stack([render(rng, place(rng, prompt), split) for prompt in prompts])


def score(images: ArrayLike, prompts: Sequence[Caption], verifier: Verifier | None = None) -> Result:
    """Scores images [N, 3, 16, 16] in [0, 1], one per prompt.

    ValueError where there is not one image per prompt, or a category has fewer than 2 prompts.
    """
    verifier = verifier or Verifier.fit()
    readings = verifier.read_all(images)
    if len(readings) != len(prompts):
        raise ValueError(
            f"the benchmark needs one image per prompt: got {len(readings)} images, {len(prompts)} prompts"
        )
    points: dict[str, list[float]] = {kind: [] for kind in (*CATEGORIES, OCR)}
    for cells, prompt in zip(readings, prompts, strict=True):
        if prompt.kind not in points:
            raise ValueError(
                f"prompt {prompt.text!r} is of kind {prompt.kind!r}, which the benchmark does not score"
            )
        points[prompt.kind].append(judged(prompt, cells))
    for kind, values in points.items():
        if len(values) < 2:
            raise ValueError(f"the benchmark needs at least 2 prompts of {kind!r}, got {len(values)}")
    scores = {kind: _summary(values) for kind, values in points.items()}
    six = [scores[kind] for kind in CATEGORIES]
    overall = Score(
        mean=float(np.mean([s.mean for s in six])),
        count=sum(s.count for s in six),
        standard_error=float(np.sqrt(sum(s.standard_error**2 for s in six)) / len(six)),
    )
    return Result(categories={kind: scores[kind] for kind in CATEGORIES}, ocr=scores[OCR], overall=overall)


def _summary(values: list[float]) -> Score:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return Score(mean=float(np.mean(values)), count=len(values), standard_error=error)


def judged(prompt: Caption, cells: Sequence[Cell]) -> float:
    """1 where the cells show what is asked for, else 0; of a number to be read the share that can be (OCR)."""
    return read_back(prompt, cells) if prompt.kind == OCR else float(fulfils(prompt, cells))


def fulfils(prompt: Caption, cells: Sequence[Cell]) -> bool:
    """Whether the cells (in reading order) show every object with its colour, count and position."""
    colours = prompt.colours or (None,) * len(prompt.digits)
    found = [
        [
            i
            for i, cell in enumerate(cells)
            if cell is not None and cell[1] == digit and colour in (None, cell[0])
        ]
        for digit, colour in zip(prompt.digits, colours, strict=True)
    ]
    if prompt.count > 1:
        return len(found[0]) == prompt.count
    if prompt.relation is not None:
        return any(_related(a, b, prompt.relation) for a in found[0] for b in found[1])
    return all(found)


def _related(a: int, b: int, relation: str) -> bool:
    # As in GenEval only the named direction counts: a diagonal neighbour is left of and above at once.
    axis = 0 if RELATIONS[relation][0] else 1
    return divmod(b, 2)[axis] - divmod(a, 2)[axis] == RELATIONS[relation][axis]


def read_back(prompt: Caption, cells: Sequence[Cell]) -> float:
    """The OCR score in [0, 1] of the digits in the cells, read in reading order."""
    wanted = "".join(map(str, prompt.digits))
    read = "".join(str(cell[1]) for cell in cells if cell is not None)
    return share_read(wanted, read)
