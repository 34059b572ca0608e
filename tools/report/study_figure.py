"""The picture of a study: every run of every arm as a dot, and what the base model had."""

import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from report.figures import COLOURS, to_png

PANELS = {
    "score": "benchmark score, with guidance\n(higher is better)",
    "score without guidance": "benchmark score, without guidance\n(higher is better)",
    "drift 0.9 to 0.65": "drift, noise 0.9 to 0.65\n(lower is better)",
}
TITLES = {
    "sft": "SFT",
    "sft_multi": "control",
    "soar": "SOAR",
    "sft_long": "SFT, computation of SOAR",
    "sft_multi_long": "control, computation of SOAR",
}


def study_figure(result: Mapping[str, Any]) -> bytes:
    """PNG with a panel for each of PANELS. `result` is the content of a study's JSON."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 2.6), layout="constrained", sharey=True)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, result, name)
        axes.set_title(title, fontsize=9)
    seeds = len(result["plan"]["seeds"])
    figure.supxlabel(f"dots: {seeds} training seeds; bars: their means; dotted: the base model", fontsize=8)
    return to_png(figure)


def _panel(axes: Axes, result: Mapping[str, Any], name: str) -> None:
    arms = {arm["name"]: arm for arm in result["arms"]}
    for row, (arm, runs) in enumerate(result["runs"].items()):
        values = [run[name] for run in runs]
        colour = COLOURS[arms[arm]["recipe"]]
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.8, markersize=6)
        mean = statistics.mean(values)
        axes.vlines(mean, row - 0.3, row + 0.3, color=colour, linewidth=2)
    axes.axvline(result["base"][name], color="#999999", linestyle="dotted")
    axes.set_yticks(
        range(len(result["runs"])),
        [f"{TITLES[arm]}\n{arms[arm]['iterations']} steps" for arm in result["runs"]],
        fontsize=8,
    )
    axes.set_ylim(len(result["runs"]) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
