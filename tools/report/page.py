"""The demo's report: one self-contained HTML page, written from metrics.json and the sample pictures."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from report import figures, words
from report.findings import findings

TITLES = {"base": "base", "sft": "SFT", "sft_multi": "control", "soar": "SOAR"}


def write_report(metrics: Mapping[str, Any], samples: Mapping[str, Path], out: Path) -> None:
    """Writes the page to `out`.

    Args:
        metrics: the content of the demo's metrics.json: what examples/digits wrote, and "demo".
        samples: per arm a picture with one row per prompt of metrics["demo"]["sample_prompts"].
    """
    body = "\n".join([
        "<h1>SOAR on a small picture generator</h1>",
        words.INTRODUCTION,
        findings_box(metrics),
        "<h2>What they draw</h2>", sample_section(metrics, samples),
        "<h2>Do the pictures show what was asked?</h2>", benchmark_section(metrics),
        "<h2>Exposure bias</h2>", drift_section(metrics),
        "<h2>Training</h2>", training_section(metrics),
        "<h2>What to doubt</h2>", doubts_section(metrics),
    ])  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(whole_page("SOAR demo report", body), encoding="utf-8")


def whole_page(title: str, body: str) -> str:
    """A self-contained page around a body."""
    style = (Path(__file__).parent / "style.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def findings_box(metrics: Mapping[str, Any]) -> str:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in findings(metrics))
    return (
        f'<div class="box"><strong>What was found, in this run</strong><ul>{items}</ul>'
        f'<p class="note">{words.NOISE}</p></div>'
    )


def sample_section(metrics: Mapping[str, Any], samples: Mapping[str, Path]) -> str:
    demo = metrics["demo"]
    png = figures.sample_grid(samples, titles(metrics), demo["sample_prompts"])
    caption = words.SAMPLES.format(guidance=demo["guidance_scale"])
    return picture(png, "Pictures drawn by each version for the same captions", caption)


def benchmark_section(metrics: Mapping[str, Any]) -> str:
    pipelines, real = metrics["pipelines"], metrics["real"]
    prompts = real["benchmark"]["overall"]["count"] + real["benchmark"]["ocr"]["count"]
    parts = [words.BENCHMARK.format(prompts=prompts), words.GUIDANCE]
    for scale, heading in scales(metrics):
        parts.append(f"<h3>{heading}</h3>")
        png = figures.scores(pipelines, titles(metrics), scale, real["benchmark"])
        parts.append(picture(png, f"Benchmark scores: {heading}", "Dotted: what real pictures score."))
        rows = [
            [figures.CATEGORY_TITLES[name]]
            + [plus_minus(p["guidance"][scale]["benchmark"][name], "mean") for p in pipelines.values()]
            + [f"{real['benchmark'][name]['mean']:.2f}"]
            for name in figures.CATEGORY_TITLES
        ]
        energy = [plus_minus(p["guidance"][scale]["energy_distance"], "value", 3) for p in pipelines.values()]
        rows.append(["energy distance (lower is better)", *energy, "0"])
        parts.append(table(["", *titles(metrics).values(), "real pictures"], rows, bold={0}))
    parts.append(words.ENERGY)
    return "\n".join(parts)


def drift_section(metrics: Mapping[str, Any]) -> str:
    pipelines = metrics["pipelines"]
    first = next(iter(pipelines.values()))["drift"]
    parts = [words.DRIFT.format(steps=first["steps"])]
    for scale, heading in scales(metrics):
        rows = []
        for i, span in enumerate(first["scales"][scale]):
            each = [p["drift"]["scales"][scale][i] for p in pipelines.values()]
            noise = f"noise {span['from']:g} to {span['to']:g}"
            rows.append([f"{noise}: drift", *(plus_minus(s, "absolute", 3) for s in each)])
            rows.append([f"{noise}: relative", *(f"{s['relative']:.2f}" for s in each)])
        png = figures.drift(pipelines, titles(metrics), scale)
        caption = f"{first['samples']} held-out pictures. {words.DRIFT_BARS.strip()}"
        parts.append(f"<h3>{heading}</h3>" + picture(png, f"Drift of each version: {heading}", caption))
        parts.append(table(["", *titles(metrics).values()], rows))
    return "\n".join(parts)


def training_section(metrics: Mapping[str, Any]) -> str:
    demo = metrics["demo"]
    soar, seconds = demo["runs"]["soar"], demo["seconds"]
    rows = [
        [
            TITLES[arm],
            str(run["iterations"]),
            str(run["batch_size"]),
            str(run["points"]),
            str(run["forwards"]),
            f"{run['tensor_parallel']} x {run['pipeline_parallel']}",
        ]
        for arm, run in demo["runs"].items()
    ]
    header = ["", "steps", "pictures per step", "training points per picture", "work per picture", "TP x PP"]
    curves = figures.losses({arm: run["losses"] for arm, run in demo["runs"].items()}, TITLES)
    text = words.TRAINING.format(
        tensor=soar["tensor_parallel"],
        pipeline=soar["pipeline_parallel"],
        processes=soar["tensor_parallel"] * soar["pipeline_parallel"],
        single=seconds["sft"],
        soar=seconds["soar"],
        total=sum(seconds.values()),
    )
    return text + table(header, rows) + picture(curves, "Training loss of each version", words.LOSSES)


def doubts_section(metrics: Mapping[str, Any]) -> str:
    real = metrics["real"]
    overall = real["benchmark"]["overall"]
    return words.DOUBTS.format(
        accuracy=real["verifier_accuracy"], real=overall["mean"], real_error=overall["standard_error"]
    ) + words.EXPORT.format(**metrics["demo"]["export"])


def titles(metrics: Mapping[str, Any]) -> dict[str, str]:
    return {arm: TITLES[arm] for arm in metrics["pipelines"]}


def scales(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Guidance scales as keys of the measurements, strongest first, each with its heading."""
    keys = next(iter(metrics["pipelines"].values()))["guidance"]
    ordered = sorted(keys, key=float, reverse=True)
    return [(key, "Without guidance" if float(key) == 1 else f"With guidance {key}") for key in ordered]


def plus_minus(value: Mapping[str, float], key: str, digits: int = 2) -> str:
    return f"{value[key]:.{digits}f} <small>&plusmn; {value['standard_error']:.{digits}f}</small>"


def table(header: list[str], rows: list[list[str]], bold: set[int] | None = None) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = [
        f"<tr{' class=total' if bold and i in bold else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def picture(png: bytes, alternative: str, caption: str) -> str:
    return f"<figure>{image(png, alternative)}<figcaption>{escape(caption)}</figcaption></figure>"


def image(png: bytes, alternative: str, style: str = "") -> str:
    """The element that holds a picture itself; style: CSS."""
    shown = f' style="{style}"' if style else ""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alternative)}"{shown} src="data:image/png;base64,{data}">'
