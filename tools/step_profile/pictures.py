"""The pictures of a profile, as PNG bytes."""

from typing import Any

from report.figures import plt, to_png

Json = dict[str, Any]

COLOURS = {
    "forward": "#4477aa",
    "backward": "#ee6677",
    "messages": "#dddddd",
    "gradient reduction": "#ccbb44",
    "parameter gather": "#aa3377",
    "data": "#66ccee",
    "optimizer": "#228833",
}
KINDS = {
    "weights": "#4477aa",
    "gradients": "#ee6677",
    "optimizer": "#228833",
    "kept weights": "#ccbb44",
    "CUDA graphs": "#66ccee",
}


def timeline(said: Json) -> bytes:
    """One step of one pipeline: a row for each pipeline rank; what is white waits or is not marked."""
    rows = said["timeline"]
    figure, axes = plt.subplots(figsize=(11, 0.9 + 0.5 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        for name, start, end in row["spans"]:
            if name in COLOURS:
                axes.broken_barh(
                    [(1e3 * start, 1e3 * (end - start))], (place - 0.4, 0.8), color=COLOURS[name], lw=0
                )
    axes.set_yticks(range(len(rows)), [f"rank {row['rank']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"milliseconds ({said['timeline_clock']})")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside upper center", ncols=len(COLOURS), frameon=False, fontsize=8)
    return to_png(figure)


def memory(said: Json) -> bytes:
    """Memory of the first pipeline over a step: what stays, by kind, and above it what comes and goes."""
    shown = [row["rank"] for row in said["timeline"]]
    rows = [rank for rank in said["ranks"] if rank["rank"] in shown]
    figure, grid = plt.subplots(
        len(rows), figsize=(11, 0.9 + 1.5 * len(rows)), layout="constrained", squeeze=False, sharex=True
    )
    for axes, row in zip(grid[:, 0], rows, strict=True):
        times, total = zip(*row["memory"]["samples"], strict=True)
        below = row["memory"]["before"] / 2**20
        axes.set_ylim(below, max(total) / 2**20 * 1.02 + 1)
        for kind, colour in KINDS.items():
            height = row["memory"]["kinds"][kind] / 2**20
            axes.axhspan(below, below + height, color=colour, lw=0)
            below += height
        axes.plot([1e3 * t for t in times], [each / 2**20 for each in total], color="#222222", lw=0.8)
        axes.set_ylabel(f"rank {row['rank']}\nMiB")
    grid[-1, 0].set_xlabel("milliseconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    figure.legend(handles, KINDS, loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=8)
    return to_png(figure)
