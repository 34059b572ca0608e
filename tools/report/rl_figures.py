"""Learning curves of RL runs, as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from report.figures import COLOURS, smooth, to_png

TRAINING, HELD_OUT = "reward/total", "validation/reward/total"


def learning_curves(runs: Mapping[str, Any]) -> bytes:
    """Rewards above, drift below; against updates on the left, against forwards on the right."""
    figure, grid = plt.subplots(2, 2, figsize=(9, 5.2), layout="constrained", sharey="row", sharex="col")
    for run in runs.values():
        colour, label = COLOURS[run["start"]], f"after {run['start'].upper()}"
        found = run["curves"]
        forwards = run["samples_per_iteration"] * run["forwards_per_sample"] / 1e6  # of an update
        spans = [name for name in found if name.startswith("drift/") and not name.endswith("relative")]
        for column, scale in enumerate((1.0, forwards)):
            above, below = grid[0, column], grid[1, column]
            _draw(above, found.get(TRAINING, []), scale, color=colour, alpha=0.25)
            _draw(above, _smoothed(found.get(TRAINING, [])), scale, color=colour, alpha=0.6, linestyle=":")
            _draw(above, found.get(HELD_OUT, []), scale, color=colour, marker="o", label=label)
            if spans:
                _draw(below, found[spans[0]], scale, color=colour, marker="o", label=label)
                below.set_ylabel(f"drift, noise {spans[0].removeprefix('drift/').replace('-', ' to ')}")
    grid[0, 0].set_ylabel("reward (line: held out)")
    grid[1, 0].set_xlabel("updates")
    grid[1, 1].set_xlabel("forwards of one sample, millions")
    grid[1, 1].set_ylabel("")
    grid[0, 0].legend(fontsize=8, frameon=False)
    return to_png(figure)


def _draw(axes: Axes, curve: Sequence[tuple[int, float]], scale: float, **style: Any) -> None:
    axes.plot([step * scale for step, _ in curve], [value for _, value in curve], **style)
    axes.spines[["top", "right"]].set_visible(False)


def _smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    values = smooth([value for _, value in curve], window=9)
    return [(step, float(value)) for (step, _), value in zip(curve, values, strict=True)]
