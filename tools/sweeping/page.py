"""The page of a sweep: tables and curves, one self-contained HTML file. Training losses of different arms are not here.

Arms train on different points, so their losses are numbers of different things; what arms share is the evaluation.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gpu_page
from matplotlib.axes import Axes
from report.figures import plt, to_png
from report.page import image, table, whole_page
from sweeping.plan import WRITTEN_BY

Json = Mapping[str, Any]

NOTES = f"""\
<p class="note">Written by {WRITTEN_BY}. Intervals are 95 %. Those of arms count the chance in training, as all arms
together show it; those of differences also the choice of prompts. Differences are paired over seeds and prompts. Holm's
correction covers the differences of the primary measures; all others were not asked beforehand and prove nothing.
A measure "at" a guidance scale of its own has the one that was an arm's best on one half of the prompts, and is the
score of the other half. Training losses of different arms are numbers of different things and are not compared.</p>
"""


def write_page(result: Json, out: Path) -> bytes:
    """The page as bytes; `out` is its name, for its title."""
    parts = [f"<h1>Sweep {escape(out.stem)}</h1>", NOTES]
    for title, rows in tables(result).items():
        parts += [f"<h2>{title}</h2>", table(rows[0], [[escape(cell) for cell in row] for row in rows[1:]])]
    parts.append("<h2>Curves</h2>")
    for name in result["measures"]:
        parts.append(f"<figure>{image(curves_figure(result, name), name)}</figure>")
    return whole_page(escape(out.stem), "\n".join(parts)).encode()


def write_markdown(result: Json) -> str:
    """The tables alone, for documents."""
    parts = []
    for title, (head, *rows) in tables(result).items():
        parts += [f"## {title}", "", *gpu_page.table(head, rows), ""]
    return "\n".join([*parts, f"Written by {WRITTEN_BY}.", ""])


def tables(result: Json) -> dict[str, list[list[str]]]:
    """The rows of each table by its title, the first of them its head."""
    return {
        "Arms": arms_rows(result),
        "Differences, primary measures": contrasts_rows(result, primary=True),
        "Other differences": contrasts_rows(result, primary=False),
    }


def arms_rows(result: Json) -> list[list[str]]:
    """A row for each arm: its length, and each measure."""
    measures = result["measures"]
    rows = []
    for arm in result["arms"]:
        work = arm["iterations"] * arm["units"]
        cells = [
            _interval(each["arms"][arm["name"]], _chosen(each, arm["name"])) for each in measures.values()
        ]
        runs = str(len(arm["seeds"]))
        rows.append([arm["name"], str(arm["iterations"]), f"{work:g}", runs, *cells])
    bases = [each["base"] for each in measures.values()]
    if any(value is not None for value in bases):
        rows.insert(0, ["base", "", "", "", *("" if value is None else f"{value:.3f}" for value in bases)])
    return [["arm", "steps", "forward units", "runs", *measures], *rows]


def _chosen(measure: Json, arm: str) -> str:
    """The guidance scale, where arms have their own."""
    scales = measure["guidance_scale"]
    return f" at {scales[arm]:g}" if len(set(scales.values())) > 1 else ""


def contrasts_rows(result: Json, primary: bool) -> list[list[str]]:
    """A row for each difference of the primary measures, or of the others."""
    rows = []
    for each in result["contrasts"]:
        if (each["measure"] in result["primary"]) != primary:
            continue
        known = each["low"] is not None
        row = [
            f"{each['arm']} - {each['reference']}",
            each["measure"],
            f"{each['value']:+.3f}",
            f"{each['low']:+.3f} to {each['high']:+.3f}" if known else "not known",
            str(each["seeds"]),
            f"{each['p']:.3f}" if known else "",
        ]
        if primary:
            row.append(f"{each['adjusted']:.3f}" if each["adjusted"] is not None else "")
        rows.append(row)
    return [["", "measure", "difference", "95 %", "seeds", "p", *(["p, Holm"] if primary else [])], *rows]


def curves_figure(result: Json, measure: str) -> bytes:
    """PNG: a measure against steps, and against computation."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    for axes, key, title in zip(
        panels, ("iteration", "forward_units"), ("steps", "forwards of a place in the batch"), strict=True
    ):
        _curves(axes, result, measure, key)
        axes.set_xlabel(title, fontsize=8)
    panels[0].set_ylabel(measure, fontsize=8)
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return to_png(figure, WRITTEN_BY)


def _curves(axes: Axes, result: Json, measure: str, key: str) -> None:
    known = result["measures"][measure]
    for i, (arm, points) in enumerate(known["curves"].items()):
        places, means = [point[key] for point in points], [point["mean"] for point in points]
        if known["base"] is not None:
            places, means = [0, *places], [known["base"], *means]
        axes.plot(places, means, marker="o", markersize=3, linewidth=1, label=arm, color=f"C{i}")
        last = known["arms"][arm]
        if last["low"] is not None:
            axes.vlines(places[-1], last["low"], last["high"], color=f"C{i}", linewidth=1)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _interval(each: Json, more: str) -> str:
    if each["low"] is None:
        return f"{each['mean']:.3f}{more}"
    return f"{each['mean']:.3f} ({each['low']:.3f} to {each['high']:.3f}){more}"
