"""The built-in images: 16 x 16 canvases of coloured real handwritten digits, with captions.

A canvas has four 8 x 8 cells in reading order, each empty or holding one scan of scikit-learn's load_digits in one of
five colours, on black. Every canvas is a pure function of (seed, index), so a data set needs no files to be repeated.
The 1797 scans are split once, so that generator, verifier and held-out canvases share none.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

CELL = 8
CANVAS = 16
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "white": (1.0, 1.0, 1.0),
}
COUNTS = {2: "two", 3: "three", 4: "four"}
# The (row, column) step from the first object's cell to the second's.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
SPLITS = {"generator": slice(0, 800), "verifier": slice(800, 1600), "held_out": slice(1600, 1797)}
# How often each kind of caption is drawn: kinds with two objects are the harder ones and come more often.
KINDS = {
    "single_object": 1.0,
    "two_object": 2.0,
    "counting": 1.5,
    "colors": 1.0,
    "position": 2.0,
    "color_attr": 2.0,
    "ocr": 1.5,
    "color_position": 1.0,
}

CORRUPT_CAPTION = 0.15
RANDOM_PLACEMENT = 0.10
PIXEL_NOISE = 0.04

# What one cell holds: nothing, or (colour, digit).
Cell = tuple[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a caption asks for. `colours` is empty where the caption leaves the colour open.

    `digits` are the different objects in caption order; for "ocr" they are the characters to be read, for
    "counting" the one digit that must appear `count` times.
    """

    kind: str
    text: str
    digits: tuple[int, ...]
    colours: tuple[str, ...] = ()
    relation: str | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """One image with its caption. `cells` is what is really on it, which a corrupted caption does not describe."""

    image: NDArray[np.float32]  # [3, 16, 16] in [0, 1]
    caption: Caption
    cells: tuple[Cell, ...]


@cache
def scans(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The scans of one split: images [N, 8, 8] in [0, 1] and their digits [N]. ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the digit scans; choose one of {', '.join(SPLITS)}")
    digits = load_digits()
    # RandomState is frozen by numpy's promise, so the split is the same with every version.
    chosen = np.random.RandomState(0).permutation(len(digits.target))[SPLITS[split]]
    return (digits.images[chosen] / 16.0).astype(np.float32), digits.target[chosen].astype(np.int64)


def draw_caption(rng: np.random.Generator, kind: str) -> Caption:
    """A random caption of one kind (a key of KINDS). ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of caption {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "ocr":
        read = tuple(int(d) for d in rng.integers(0, 10, size=rng.integers(2, 5)))
        return Caption(kind=kind, text=f'the number "{"".join(map(str, read))}"', digits=read)
    first, second = (int(d) for d in rng.choice(10, size=2, replace=False))
    if kind == "counting":
        count = int(rng.integers(2, 5))
        return Caption(kind=kind, text=f"{COUNTS[count]} {first}s", digits=(first,), count=count)
    names = tuple(str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
    if kind == "single_object":
        return Caption(kind=kind, text=_noun(first), digits=(first,))
    if kind == "colors":
        return Caption(kind=kind, text=_noun(first, names[0]), digits=(first,), colours=names[:1])
    if kind == "two_object":
        return Caption(kind=kind, text=f"{_noun(first)} and {_noun(second)}", digits=(first, second))
    if kind == "color_attr":
        text = f"{_noun(first, names[0])} and {_noun(second, names[1])}"
        return Caption(kind=kind, text=text, digits=(first, second), colours=names)
    relation = str(rng.choice(list(RELATIONS)))
    if kind == "position":
        text = f"{_noun(first)} {relation} {_noun(second)}"
        return Caption(kind=kind, text=text, digits=(first, second), relation=relation)
    text = f"{_noun(first, names[0])} {relation} {_noun(second, names[1])}"
    return Caption(kind=kind, text=text, digits=(first, second), colours=names, relation=relation)


def _noun(digit: int, colour: str | None = None) -> str:
    if colour is not None:
        return f"a {colour} {digit}"
    return f"an {digit}" if digit == 8 else f"a {digit}"


def place(rng: np.random.Generator, caption: Caption) -> tuple[Cell, ...]:
    """Cells in reading order that fulfil the caption, with nothing that it does not mention."""
    digits = caption.digits * caption.count
    if caption.kind == "ocr":
        where = np.arange(len(digits))
    elif caption.relation is not None:
        step = np.array(RELATIONS[caption.relation])
        free = rng.integers(0, 2)
        start = np.where(step == 0, free, step < 0)
        where = np.array([start, start + step]) @ np.array([2, 1])
    else:
        where = rng.choice(4, size=len(digits), replace=False)
    if caption.colours:
        colours = list(caption.colours)
    elif caption.kind in ("ocr", "counting"):
        colours = [str(rng.choice(list(COLOURS)))] * len(digits)
    else:
        colours = [str(c) for c in rng.choice(list(COLOURS), size=len(digits))]
    cells: list[Cell] = [None] * 4
    for cell, colour, digit in zip(where, colours, digits, strict=True):
        cells[int(cell)] = (colour, digit)
    return tuple(cells)


def render(
    rng: np.random.Generator, cells: tuple[Cell, ...], split: str = "generator"
) -> NDArray[np.float32]:
    """Draws cells with random scans of the split -> [3, 16, 16] in [0, 1]."""
    images, labels = scans(split)
    canvas = np.zeros((3, CANVAS, CANVAS), dtype=np.float32)
    for index, cell in enumerate(cells):
        if cell is None:
            continue
        colour, digit = cell
        scan = images[rng.choice(np.flatnonzero(labels == digit))]
        row, column = divmod(index, 2)
        paint = np.array(COLOURS[colour], dtype=np.float32)[:, None, None] * scan
        canvas[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = paint
    return canvas


def make_canvas(seed: int, index: int, *, split: str = "generator", noisy: bool = False) -> Canvas:
    """Canvas `index` of the endless data set `seed`.

    `noisy` is the variant for pretraining, a stand-in for web data: 15 % of the captions belong to another canvas of
    their kind, 10 % of the canvases are shuffled (half of those with one more digit), all have pixel noise of .04 RMS.
    """
    rng = np.random.default_rng([seed, index])
    weights = np.array(list(KINDS.values()))
    kind = str(rng.choice(list(KINDS), p=weights / weights.sum()))
    caption = draw_caption(rng, kind)
    cells = place(rng, caption)
    if noisy and rng.random() < RANDOM_PLACEMENT:
        cells = _shuffle(rng, cells)
    image = render(rng, cells, split)
    if noisy:
        image = np.clip(image + PIXEL_NOISE * rng.standard_normal(image.shape, dtype=np.float32), 0.0, 1.0)
        if rng.random() < CORRUPT_CAPTION:
            caption = draw_caption(rng, kind)
    return Canvas(image=image, caption=caption, cells=cells)


def _shuffle(rng: np.random.Generator, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    shuffled = [cells[i] for i in rng.permutation(4)]
    empty = [i for i, cell in enumerate(shuffled) if cell is None]
    if empty and rng.random() < 0.5:
        shuffled[int(rng.choice(empty))] = (str(rng.choice(list(COLOURS))), int(rng.integers(0, 10)))
    return tuple(shuffled)


def write_image_folder(
    folder: str | Path, count: int, seed: int, *, split: str = "generator", noisy: bool = False
) -> None:
    """Writes canvases 0..count-1 of the data set as 000000.png with the caption in 000000.txt beside it.

    ValueError where count is not positive.
    """
    if count <= 0:
        raise ValueError(f"count must be positive to write an image folder, got {count}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        canvas = make_canvas(seed, index, split=split, noisy=noisy)
        pixels = np.round(canvas.image.transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")
        (folder / f"{index:06d}.txt").write_text(canvas.caption.text + "\n")
