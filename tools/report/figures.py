"""The figures of a report, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Paul Tol's bright scheme: told apart with any colour vision.
COLOURS = {"base": "#999999", "sft": "#4477aa", "sft_multi": "#ccbb44", "soar": "#ee6677"}
CATEGORY_TITLES = {
    "overall": "overall",
    "single_object": "one digit",
    "two_object": "two digits",
    "counting": "counting",
    "colors": "colour",
    "position": "position",
    "color_attr": "colour of each",
    "ocr": "reading back",
}


def to_png(figure: Figure, written_by: str | None = None) -> bytes:
    """Closes the figure. `written_by` is named in the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": written_by} if written_by else None)
    plt.close(figure)
    return buffer.getvalue()


def scores(
    pipelines: Mapping[str, Any], titles: Mapping[str, str], scale: str, ceiling: Mapping[str, Any]
) -> bytes:
    """Benchmark bars of every category at one guidance scale, with error bars and the score of real
    canvases.
    """
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    names = list(CATEGORY_TITLES)
    place = np.arange(len(names))
    width = 0.8 / len(pipelines)
    for i, (arm, measured) in enumerate(pipelines.items()):
        values = [measured["guidance"][scale]["benchmark"][name] for name in names]
        _bars(axes, place + (i - (len(pipelines) - 1) / 2) * width, values, "mean", width, arm, titles[arm])
    for x, name in zip(place, names, strict=True):
        axes.hlines(ceiling[name]["mean"], x - 0.42, x + 0.42, colors="#222222", linestyles="dotted")
    axes.set_xticks(place, [CATEGORY_TITLES[name] for name in names], fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of pictures that are right")
    _legend(axes)
    return to_png(figure)


def drift(pipelines: Mapping[str, Any], titles: Mapping[str, str], scale: str) -> bytes:
    """Drift of every arm at every span of noise and one guidance scale, with error bars."""
    figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    spans = next(iter(pipelines.values()))["drift"]["scales"][scale]
    place = np.arange(len(spans))
    width = 0.8 / len(pipelines)
    for i, (arm, measured) in enumerate(pipelines.items()):
        where = place + (i - (len(pipelines) - 1) / 2) * width
        _bars(axes, where, measured["drift"]["scales"][scale], "absolute", width, arm, titles[arm])
    axes.set_xticks(place, [f"noise {span['from']:g} to {span['to']:g}" for span in spans])
    axes.set_ylabel("error (lower is better)")
    _legend(axes)
    return to_png(figure)


def _bars(
    axes: Axes,
    where: np.ndarray,
    values: Sequence[Mapping[str, float]],
    key: str,
    width: float,
    arm: str,
    title: str,
) -> None:
    heights = [value[key] for value in values]
    errors = [value["standard_error"] for value in values]
    axes.bar(
        where,
        heights,
        width,
        yerr=errors,
        color=COLOURS[arm],
        label=title,
        error_kw={"lw": 1, "ecolor": "#444444"},
    )


def losses(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], titles: Mapping[str, str]
) -> bytes:
    """Training loss on ideal states (left) and on auxiliary points (right), over iterations: {arm: {kind:
    [(i, loss)]}}.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    right.set_yscale("log")  # the targets of points with little noise make it jump
    for axes, kind, title in ((left, "base", "on ideal states"), (right, "aux", "on auxiliary points")):
        for arm, kinds in curves.items():
            if kinds.get(kind):
                iterations, values = zip(*kinds[kind], strict=True)
                axes.plot(iterations, smooth(values), color=COLOURS[arm], label=titles[arm])
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("iteration")
    left.set_ylabel("training loss")
    _legend(left)
    return to_png(figure)


def smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Running mean over at most `window` values around each: same length."""
    half = window // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def sample_grid(images: Mapping[str, Path], titles: Mapping[str, str], prompts: Sequence[str]) -> bytes:
    """A row per prompt and a block of columns per arm, from pictures that `soar-mega sample` wrote with one
    row per prompt.
    """
    figure, grid = plt.subplots(
        len(prompts), len(images), figsize=(9, 0.42 * len(prompts) + 0.3), layout="constrained", squeeze=False
    )
    for column, (arm, path) in enumerate(images.items()):
        picture = np.asarray(Image.open(path).convert("RGB"))
        if picture.shape[0] % len(prompts):
            raise ValueError(
                f"{path} has {picture.shape[0]} rows of pixels, which {len(prompts)} prompts do not divide"
            )
        for row, strip in enumerate(np.split(picture, len(prompts))):
            axes = grid[row, column]
            axes.imshow(with_gaps(strip), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(prompts[row], rotation=0, ha="right", va="center", fontsize=8)
            if row == 0:
                axes.set_title(titles[arm], fontsize=9)
    return to_png(figure)


def with_gaps(strip: np.ndarray, gap: int = 3) -> np.ndarray:
    """Square pictures side by side [S, n S, 3] with white between them."""
    side = strip.shape[0]
    parts = [
        np.pad(part, ((0, 0), (0, gap), (0, 0)), constant_values=255)
        for part in np.split(strip, strip.shape[1] // side, axis=1)
    ]
    return np.concatenate(parts, axis=1)[:, :-gap]


def side_by_side(images: Sequence[Image.Image], scale: int) -> Image.Image:
    """Small pictures of one size in a row, enlarged."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
