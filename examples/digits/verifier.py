"""The verifier of the built-in benchmark: reads what a 16 x 16 canvas shows.

It is independent of the generator: a support vector machine learned from scans that no generated canvas was trained on
tells the digits, and a fixed rule tells the colours.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.svm import SVC

from soar_mega.examples.digits.canvases import CANVAS, CELL, COLOURS, Cell, scans

# A cell holds something if its brightness (the largest channel) is above this on average; the faintest scan has .22.
OCCUPIED = 0.10
SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
TRAINING_NOISE = 0.05


@dataclass(frozen=True)
class Verifier:
    """Reads canvases. Make it by `Verifier.fit()`, which learns once per process."""

    classifier: SVC

    @staticmethod
    def fit() -> "Verifier":
        """The verifier learned from the split "verifier" of the scans, each also shifted by a pixel and with noise."""
        return _fit()

    def accuracy(self, split: str = "held_out") -> float:
        """Share of single scans of a split whose digit it tells."""
        images, digits = scans(split)
        return float(np.mean(self.classifier.predict(images.reshape(len(images), -1)) == digits))

    def read(self, image: ArrayLike) -> tuple[Cell, ...]:
        """What an image [3, 16, 16] in [0, 1] shows: four cells in reading order, None or (colour, digit)."""
        return self.read_all(np.asarray(image)[None])[0]

    def read_all(self, images: ArrayLike) -> list[tuple[Cell, ...]]:
        """`read` for images [N, 3, 16, 16]. ValueError for another shape or for values outside [0, 1]."""
        cells = split_cells(images)
        brightness = cells.max(axis=2)
        digits = self.classifier.predict(_normalised(brightness).reshape(-1, CELL * CELL)).reshape(-1, 4)
        occupied = brightness.mean(axis=(2, 3)) > OCCUPIED
        colours = _colour(cells)
        names = list(COLOURS)
        return [
            tuple((names[colours[i, c]], int(digits[i, c])) if occupied[i, c] else None for c in range(4))
            for i in range(len(cells))
        ]

    def features(self, images: ArrayLike) -> NDArray[np.float64]:
        """What images [N, 3, 16, 16] look like to the verifier, for distances between sets of images: [N, 56].

        Each cell gives its brightness over .3, its colour (3, weighted by how much is there) and the classifier's ten
        decision values over 9 (their largest), zeros in an empty cell.
        """
        cells = split_cells(images)
        brightness = cells.max(axis=2)
        mean = brightness.mean(axis=(2, 3))
        occupied = (mean > OCCUPIED)[:, :, None]
        scores = self.classifier.decision_function(_normalised(brightness).reshape(-1, CELL * CELL)) / 9.0
        colour = _mean_colour(cells)
        parts = [mean[:, :, None] / 0.3, colour * occupied, scores.reshape(-1, 4, 10) * occupied]
        return np.concatenate(parts, axis=2).reshape(len(cells), -1)


@lru_cache(maxsize=1)
def _fit() -> Verifier:
    images, digits = scans("verifier")
    rng = np.random.default_rng(0)
    shifted = np.concatenate([_shift(images, *step) for step in SHIFTS])
    noisy = shifted + TRAINING_NOISE * rng.standard_normal(shifted.shape)
    inputs = np.concatenate([images, noisy]).clip(0, 1)
    labels = np.tile(digits, len(SHIFTS) + 1)
    return Verifier(SVC(C=10.0, gamma=0.075).fit(inputs.reshape(len(inputs), -1), labels))


def _shift(images: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    # [N, 8, 8] moved within its cell; what leaves it is lost, as in a badly drawn canvas.
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - rows : 1 - rows + CELL, 1 - columns : 1 - columns + CELL]


def split_cells(images: ArrayLike) -> NDArray[np.float64]:
    """[N, 3, 16, 16] in [0, 1] -> [N, 4, 3, 8, 8], cells in reading order. ValueError for anything else."""
    pixels = np.asarray(images, dtype=np.float64)
    if pixels.ndim != 4 or pixels.shape[1:] != (3, CANVAS, CANVAS):
        raise ValueError(
            f"the verifier reads canvases [N, 3, {CANVAS}, {CANVAS}], got shape {list(pixels.shape)}"
        )
    if not (pixels.min(initial=0.0) >= 0.0 and pixels.max(initial=0.0) <= 1.0):
        raise ValueError(
            "the verifier reads images in [0, 1]: map [-1, 1] by (x + 1) / 2, clamp, replace NaN"
        )
    grid = pixels.reshape(-1, 3, 2, CELL, 2, CELL)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 4, 3, CELL, CELL)


def _normalised(brightness: NDArray[np.float64]) -> NDArray[np.float64]:
    # A generated digit may be a little too dark or bright as a whole; every real scan reaches 15/16 or 1.
    return brightness / np.maximum(brightness.max(axis=(2, 3), keepdims=True), 0.5)


def _mean_colour(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    # [N, 4, 3, 8, 8] -> [N, 4, 3]: brightness-weighted mean, the largest channel scaled to 1.
    weight = cells.max(axis=2, keepdims=True)
    mean = (cells * weight).sum(axis=(3, 4))
    return mean / np.maximum(mean.max(axis=2, keepdims=True), 1e-6)


def _colour(cells: NDArray[np.float64]) -> NDArray[np.int64]:
    # [N, 4, 3, 8, 8] -> [N, 4]: the index of the nearest of COLOURS.
    palette = np.array(list(COLOURS.values()))
    distance = np.square(_mean_colour(cells)[:, :, None, :] - palette).sum(axis=-1)
    return distance.argmin(axis=2)
