"""The HTML page of a profile: the numbers of its JSON, and its pictures."""

from collections.abc import Mapping
from html import escape
from typing import Any

from report.page import picture, table, whole_page
from step_profile.kernels import short

Json = dict[str, Any]


def page(said: Json, pictures: Mapping[str, bytes]) -> str:
    """The whole page, readable without any other file."""
    body = "\n".join(
        [
            "<h1>Where the time of a step goes</h1>",
            f"<p><code>{escape(said['command'])}</code><br>{escape(said['date'])}, {escape(said['device'])}, torch "
            f"{escape(said['torch'])}, commit {escape(said['commit'])}</p>",
            overview(said),
            "<h2>Phases</h2>",
            phases(said),
            "<h2>Pipeline</h2>",
            bubbles(said),
            picture(
                pictures["timeline"],
                "What each pipeline rank did in a step",
                "One step of the first pipeline; white: waits, or not marked.",
            ),
            "<h2>Memory</h2>",
            memory(said),
            picture(
                pictures["memory"],
                "Memory over a step",
                "Line: all that is allocated (on a CPU: resident).",
            ),
            *([] if said["kernels"] is None else ["<h2>Kernels</h2>", kernels(said["kernels"])]),
            "<h2>Operators</h2>",
            operators(said),
        ]
    )
    return whole_page("Profile of a step", body)


def overview(said: Json) -> str:
    """What ran, how fast, and what recording cost."""
    layout, work = said["layout"], said["work"]
    rows = [
        ["layout", escape(", ".join(f"{name} {value}" for name, value in layout.items()))],
        ["step (median, not recorded)", milliseconds(said["median_seconds"])],
        [
            "step (mean of the recorded, whose phases are below)",
            milliseconds(said["ranks"][0]["step_seconds"]),
        ],
        ["recording adds", overhead(said)],
        ["work of a step", f"{work['step']['total'] / 1e12:.4g} TFLOP"],
        ["computed again beside it", f"{work['recomputed'] / 1e12:.4g} TFLOP"],
        ["TFLOP/s per process", f"{work['tflops_per_process']:.4g}"],
        ["MFU", "peak unknown" if work["mfu"] is None else f"{work['mfu']:.1%}"],
    ]
    if said["collection"] is not None:
        rows.append(["collecting samples, before the steps", escape(collected(said["collection"]))])
    busy = said["gpu_busy"]
    if busy is not None:
        rows.append(["GPU busy (kernels of a profiled step over the median step)", f"{busy:.1%}"])
    for kind, count in work["step"].items():
        if kind != "total":
            rows.append([f"of the work: {kind}", f"{count / max(work['step']['total'], 1):.1%}"])
    return table(["", ""], rows)


def collected(collection: Json) -> str:
    """What drawing samples takes, and in what phases."""
    phases = ", ".join(
        f"{name} {milliseconds(phase['host'])}" for name, phase in collection["phases"].items()
    )
    return (
        f"{milliseconds(collection['seconds'])} for every {collection['steps_between']} steps (median of "
        f"{collection['count']}; the last one: {phases})"
    )


def overhead(said: Json) -> str:
    """What recording costs; processor time is the steadier one where other programs run."""
    clock, processor = said["overhead"]["clock"], said["overhead"]["processor"]
    steps = len(said["seconds"]["recorded"])
    return f"{clock:+.1%} on the clock, {processor:+.1%} of processor time (medians of {steps} steps)"


def first_pipeline(said: Json) -> list[Json]:
    """The ranks that the page shows; the JSON has all."""
    shown = [row["rank"] for row in said["timeline"]]
    return [rank for rank in said["ranks"] if rank["rank"] in shown]


def phases(said: Json) -> str:
    """Host, process and device milliseconds per step of each rank."""
    parts = []
    for rank in first_pipeline(said):
        has_device = any("device" in phase for phase in rank["phases"].values())
        clocks = ["host", "process", *(["device"] if has_device else [])]
        rows = [
            [
                escape(name),
                *(milliseconds(phase.get(clock, 0.0)) for clock in clocks),
                f"{phase['calls']:.4g}",
            ]
            for name, phase in rank["phases"].items()
        ]
        rows.append(["sum", *(milliseconds(rank["sums"].get(clock, 0.0)) for clock in clocks), ""])
        heading = (
            f"<h3>rank {rank['rank']}: {escape(', '.join(f'{k} {v}' for k, v in rank['place'].items()))}</h3>"
        )
        parts += [heading, table(["per step", *clocks, "times"], rows, bold={len(rows) - 1})]
    parts.append(
        "<p>Each row is without the rows within it. host: time on the clock; process: processor time of all threads "
        "of the process; device: time between the GPU's arrivals at both ends.</p>"
    )
    return "\n".join(parts)


def bubbles(said: Json) -> str:
    """Measured standstill against the ideal."""
    rows = [
        [
            escape(phase),
            str(one["micro_batches"]),
            milliseconds(one["seconds"]),
            f"{one['measured']:.1%}",
            f"{one['ideal']:.1%}",
        ]
        for phase, one in said["bubble"].items()
    ]
    return table(["", "micro-batches", "from first to last", "standstill", "ideal bubble"], rows)


def memory(said: Json) -> str:
    """MiB of what stays, and the most there was."""
    kinds = list(said["ranks"][0]["memory"]["kinds"])
    rows = [
        [
            f"rank {rank['rank']}",
            mebibytes(rank["memory"]["before"]),
            *(mebibytes(rank["memory"]["kinds"][kind]) for kind in kinds),
            mebibytes(rank["memory"]["most"]),
        ]
        for rank in first_pipeline(said)
    ]
    return table(["MiB", "before the model", *kinds, "most of all"], rows)


def kernels(ran: Json) -> str:
    """What the GPU did on rank 0: kinds of kernels, and the largest kernels."""
    numbers = ["launches", "time", "of the step"]
    kinds = [[kind["name"], *numbers_of(kind)] for kind in ran["kinds"]]
    top = [
        [f"<code>{escape(short(one['name']))}</code>", one["kind"], *numbers_of(one)] for one in ran["top"]
    ]
    return table(["kind", *numbers], kinds) + table(["kernel", "kind", *numbers], top)


def numbers_of(total: Json) -> list[str]:
    """Of a kind of kernels, or of one."""
    return [str(total["launches"]), milliseconds(total["seconds"]), f"{total['share']:.1%}"]


def operators(said: Json) -> str:
    """What took most of the host's time in a step on rank 0."""
    rows = [
        [
            f"<code>{escape(row['name'][:100])}</code>",
            str(row["calls"]),
            milliseconds(row["host_seconds"]),
        ]
        for row in said["operators"]["top"]
    ]
    return table(["rank 0, one profiled step", "calls", "host"], rows)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f}"
