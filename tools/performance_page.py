"""docs/performance.md from benchmarks/results: how fast, against what, and where the time goes.

    python tools/performance_page.py        after a new file in benchmarks/results

Of each kind of file the newest for each device and case is shown: *-compare-*.json (tools/compare_baseline.py),
*-profile*.json (the profile.json of tools/profile_step.py), *-host.json (tools/bench_host.py) and *-kernels.json
(tools/bench_kernels.py).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import no_arguments
from gpu_page import RESULTS, ROOT, link, table
from step_profile.kernels import short

PAGE = ROOT / "docs" / "performance.md"
TEXT = Path(__file__).with_suffix(".md")

Json = dict[str, Any]

NONE = "Not measured yet: no such file is in `benchmarks/results`."


def page(results: Path) -> str:
    """The whole page: the text of tools/performance_page.md, with what was measured in the places that it names."""
    sections = {
        "comparisons": [*shown(results, r".*-compare-.*", compared), *by_hand(results)],
        "profiles": shown(results, r".*-profile.*", profiled),
        "host": shown(results, r".*-host", host),
        "kernels": shown(results, r".*-kernels", kernels),
    }
    text = TEXT.read_text()
    for name, lines in sections.items():
        assert text.count(f"@{name}\n") == 1
        text = text.replace(f"@{name}\n", "\n".join(lines) + "\n")
    return text


def shown(results: Path, name: str, section: Callable[[Json], list[str]]) -> list[str]:
    """A section for the newest file of each device and case, or a word that there is none."""
    newest: dict[str, Path] = {}
    for file in sorted(results.glob("*.json"), key=lambda file: file.stem):  # names begin with the date
        if re.fullmatch(name, file.stem):
            newest[file.stem[len("2026-01-01-") :]] = file
    lines: list[str] = []
    for file in newest.values():
        said = json.loads(file.read_text())
        lines += ["", *section(said), "", source(file.name, said)]
    return lines[1:] or [NONE]


def source(file: str, said: Json) -> str:
    """Where numbers come from."""
    commit = f", commit {said['commit']}" if "commit" in said else ""
    return f"{said['date']}, torch {said['torch']}{commit}. Command: `{said['command']}`. {link(file)}."


def compared(said: Json) -> list[str]:
    """Our steps against the published procedure's."""
    threads = f" ({said['threads']} threads)" if said["device"] == "cpu" else ""
    title = (
        f"**{said['model']} on {said['device']}{threads}**, {said['dtype']}, {said['batch_size']} samples per step, "
        f"N = {said['stage']['num_auxiliary_points']}:"
    )
    has_mfu = any(row.get("mfu") is not None for row in said["rows"])
    columns = [
        "row",
        "per forward",
        "samples/s",
        "of the first row",
        "peak GiB",
        *(["MFU"] if has_mfu else []),
    ]
    lines = [title, "", *table(columns, [compared_row(row)[: len(columns)] for row in said["rows"]])]
    return [*lines, "", said["note"]] if "note" in said else lines


def compared_row(row: Json) -> list[str]:
    """The cells of one arm, or why it could not run."""
    if row.get("failure") is not None:
        return [row["name"], str(row["micro_batch"]), row["failure"], "", "", ""]
    return [
        row["name"],
        str(row["micro_batch"]),
        f"{row['samples_per_second']:.2f}",
        f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})",
        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}",
        percent(row.get("mfu")),
    ]


def by_hand(results: Path) -> list[str]:
    """What was measured before there was a tool for it, and written down."""
    lines: list[str] = []
    for file in sorted(results.glob("*.json")):
        said = json.loads(file.read_text())
        for each in said.get("tables", []):
            if each["columns"][0] == "arm":
                title = f"**{said['device']}, by hand:** {each['title']}:"
                lines += ["", title, "", *table(each["columns"], each["rows"]), "", source(file.name, said)]
    return lines


def profiled(said: Json) -> list[str]:
    """Phases of rank 0, and how much of the time the GPU and the pipeline stood still."""
    layout, work = said["layout"], said["work"]
    facts = [
        f"a step takes {1e3 * said['median_seconds']:.1f} ms",
        f"{work['tflops_per_process']:.4g} TFLOP/s",
    ]
    if work["mfu"] is not None:
        facts.append(f"MFU {percent(work['mfu'])}")
    if said["gpu_busy"] is not None:
        facts.append(f"GPU busy {percent(said['gpu_busy'])}")
    facts.append(f"recording it added {percent(said['overhead']['clock'])}")
    if said.get("collection") is not None:  # of stages that draw their samples
        facts.append(collected(said["collection"]))
    sizes = ", ".join(f"{name} {layout[name]}" for name in ("TP", "PP", "VPP", "CP", "DP"))
    first = said["ranks"][0]
    clocks = [clock for clock in ("host", "device") if any(clock in p for p in first["phases"].values())]
    # of a recorded step, on the GPU's clock where there is one: the host runs ahead of it
    whole = first["sums"][clocks[-1]]
    rows = [
        [
            name,
            *(f"{1e3 * phase[clock]:.1f}" for clock in clocks),
            percent(phase[clocks[-1]] / whole),
        ]
        for name, phase in first["phases"].items()
    ]
    lines = [
        f"**{said['recipe']} on {said['device']}** ({sizes}): {', '.join(facts)}. The phases are those of the recorded "
        f"steps, and add up to {1e3 * whole:.1f} ms.",
        "",
        *table(["rank 0, per recorded step", *(f"{clock} ms" for clock in clocks), "of it"], rows),
    ]
    if layout["PP"] > 1:
        for phase, one in said["bubble"].items():
            lines += [
                "",
                f"`{phase}`: the pipeline stands still for {percent(one['measured'])} of the pass; the ideal bubble of "
                f"{one['micro_batches']} micro-batches is {percent(one['ideal'])}.",
            ]
    if said.get("kernels") is not None:
        lines += ["", *step_kernels(said["kernels"])]
    return lines


def collected(collection: Json) -> str:
    """What drawing samples takes beside the steps."""
    return (
        f"the samples of {collection['steps_between']} steps are collected in "
        f"{1e3 * collection['seconds']:.1f} ms before them"
    )


def step_kernels(ran: Json) -> list[str]:
    """What the GPU did in a step: kinds of kernels, each with the largest of them."""
    rows = []
    for kind in ran["kinds"]:
        largest = next((one["name"] for one in ran["top"] if one["kind"] == kind["name"]), None)
        rows.append(
            [
                kind["name"],
                f"{1e3 * kind['seconds']:.1f}",
                str(kind["launches"]),
                f"{100 * kind['share']:.1f} %",
                "" if largest is None else f"`{short(largest)}`",
            ]
        )
    return table(["kernels", "ms", "launches", "of the step", "the largest"], rows)


def host(said: Json) -> list[str]:
    """Milliseconds of Python and torch for each form of the model."""
    rows = [
        [
            form,
            f"{row['forward_ms']:.1f} ({row['forward_ratio']:.2f})",
            f"{row['both_ms']:.1f} ({row['both_ratio']:.2f})",
        ]
        for form, row in said["forms"].items()
    ]
    title = (
        f"{said['layers']} layers, {said['dual_layers']} of them with the second attention; the lowest of "
        f"{said['rounds']} rounds, and the median of their ratios:"
    )
    return [title, "", *table(["form", "forward, ms (of plain)", "with backward, ms (of plain)"], rows)]


def kernels(said: Json) -> list[str]:
    """Device and host time of each operation, and the share of a copy's bandwidth."""
    copy = said["copy_bandwidth"]
    rows = [
        [
            row["name"],
            row["form"],
            f"{1e6 * row['device_seconds']:.1f}",
            "" if row["host_seconds"] is None else f"{1e6 * row['host_seconds']:.0f}",
            f"{row['bytes'] / row['device_seconds'] / 1e9:.0f}",
            percent(row["bytes"] / row["device_seconds"] / copy),
        ]
        for row in said["rows"]
    ]
    columns = ["operation", "form", "device us", "host us", "GB/s", "of a copy"]
    return [f"**{said['device']}**, a copy reaches {copy / 1e9:.0f} GB/s:", "", *table(columns, rows)]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def main() -> None:
    no_arguments(__doc__)
    PAGE.write_text(page(RESULTS))
    print(f"Written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
