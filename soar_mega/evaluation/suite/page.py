"""The report as one HTML page that needs nothing beside it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from soar_mega.evaluation.suite import svg
from soar_mega.evaluation.suite.contact_sheets import contact_sheet
from soar_mega.evaluation.suite.store import MARK, Json
from soar_mega.evaluation.suite.suite_settings import Point
from soar_mega.evaluation.suite.tables import Column, Tables

STYLE = """\
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e6e6e6; }
th:first-child, td:first-child { text-align: left; }
tr.published td { color: #666; font-style: italic; }
td.beyond { font-weight: 600; }
small, .note { color: #5a606a; }
svg { width: 100%; font: 11px system-ui, sans-serif; }
figure { margin: .6rem 0; }
.legend span { margin-right: 1rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
.sheet td { text-align: center; vertical-align: top; } .sheet td:first-child { max-width: 16rem; }
.sheet img { width: 9rem; image-rendering: pixelated; display: block; }
.warning { background: #fdf1e7; border-left: 4px solid #ee7733; padding: .4rem 1rem; }
"""
NOTES = """\
<p class="note">Small numbers are standard errors of the bootstrap over prompts: what other prompts of the same kind
would change. They do not count the chance in training; several runs of one arm, named NAME#1, NAME#2 and so on, show
that. Differences are paired: both models drew the same prompts from the same noise. One whose 95 % interval leaves out
zero is printed bold; of twenty comparisons of equal models one is bold by chance.</p>"""


def write_page(tables: Tables, said: Json) -> str:
    """The page.

    Args:
        said: what report.json holds.
    """
    sections = [
        f"<h1>{escape(', '.join(model.name for model in tables.models))}</h1>",
        f'<p class="note">{MARK.decode()}, suite {escape(tables.suite.name)}, code {escape(said["code"])}</p>',
        _defects(said),
        *(_table(tables, said, point) for point in _shown(tables)),
        NOTES,
        _differences(tables, said),
        _sweep(tables, said),
        _categories(tables, said),
        _reasons(tables, said),
        _distances(said),
        _drift(tables),
        _training(tables),
        *(contact_sheet(tables, column) for column in tables.columns()),
    ]
    title = f"Evaluation: {escape(tables.suite.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>\n{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _shown(tables: Tables) -> list[Point]:
    """The table's point, and the one without guidance at as many steps."""
    first = tables.suite.points[0]
    plain = Point(1.0, first.steps)
    return [first, *([plain] if plain in tables.suite.points and plain != first else [])]


def _defects(said: Json) -> str:
    lines = [
        f"<li>{each['images']} of {each['of']} images of {escape(each['model'])} "
        f"({Point(each['guidance_scale'], each['steps'])}, {escape(each['set'])}) are {each['are']}</li>"
        for each in said["defects"]
    ]
    if not lines:
        return ""
    words = "<strong>Images that are no pictures</strong>, scored as the black ones that their files hold"
    return f'<div class="warning">{words}<ul>{"".join(lines)}</ul></div>'


def _table(tables: Tables, said: Json, point: Point) -> str:
    """The seed's table: a row for each model, arm and published row."""
    columns = tables.columns()
    rows = [
        [escape(model.name), *(_cell(_score(said, model.name, point, column)) for column in columns)]
        for model in tables.models
    ]
    for arm in dict.fromkeys(each["arm"] for each in said["arms"]):
        own = [each for each in said["arms"] if each["arm"] == arm and _is_at(each, point)]
        rows.append([f"{escape(arm)}, mean of {own[0]['runs']} runs", *map(_cell, own)])
    html = [_row(["", *(escape(column.title) for column in columns)], "th"), *map(_row, rows)]
    if point == tables.suite.points[0]:
        for name, values in said["published"].items():
            cells = [f"{values[c.scorer]:g}" if c.scorer in values else "" for c in columns]
            html.append(_row([f"{escape(name)} (published)", *cells], "td", "published"))
    return f"<h2>Scores at {point}</h2><table>{''.join(html)}</table>"


def _differences(tables: Tables, said: Json) -> str:
    if len(tables.models) < 2:
        return ""
    columns = tables.columns()
    parts = ["<h2>Differences</h2>"]
    for point in _shown(tables):
        at = [each for each in said["differences"] if _is_at(each, point)]
        rows = []
        for pair in dict.fromkeys((each["model"], each["minus"]) for each in at):
            own = [each for each in at if (each["model"], each["minus"]) == pair]
            rows.append(
                f"<tr><td>{escape(pair[0])} - {escape(pair[1])}</td>{''.join(map(_signed, own))}</tr>"
            )
        head = _row(["", *(escape(column.title) for column in columns)], "th")
        parts.append(f"<h3>{point}</h3><table>{head}{''.join(rows)}</table>")
    return "".join(parts)


def _sweep(tables: Tables, said: Json) -> str:
    suite = tables.suite
    parts = []
    if len(suite.guidance_scales) > 1:
        places = suite.guidance_scales
        points = [Point(scale, suite.steps[0]) for scale in places]
        parts.append("<h2>Sampling guidance</h2>")
        parts += [
            _curve(tables, said, column, places, points, "guidance scale") for column in tables.columns()
        ]
        parts.append(_best(tables, said))
    if len(suite.steps) > 1:
        points = [Point(suite.guidance_scales[0], steps) for steps in suite.steps]
        parts.append("<h2>Sampling steps</h2>")
        parts += [_curve(tables, said, column, suite.steps, points, "steps") for column in tables.columns()]
    return "".join(parts)


def _curve(
    tables: Tables, said: Json, column: Column, places: Sequence[float], points: Sequence[Point], label: str
) -> str:
    series = {
        model.name: [_whisker(_score(said, model.name, point, column)) for point in points]
        for model in tables.models
    }
    return f"<h3>{escape(column.title)}</h3>{svg.curves(places, series, label)}"


def _best(tables: Tables, said: Json) -> str:
    found = said["best_of_sweep"]
    if not found:
        return ""
    columns = [column.title for column in tables.columns()]
    rows = []
    for model in tables.models:
        cells = []
        for column in columns:
            own = [each for each in found if each["model"] == model.name and each["column"] == column]
            cells.append(_best_cell(own[0]) if own else "")
        rows.append(_row([escape(model.name), *cells]))
    head = _row(["", *map(escape, columns)], "th")
    return (
        "<h3>Each model at its own best scale</h3>"
        '<p class="note">The scale was chosen on one half of the prompts; the scores are those of the other half, in '
        "front of them the difference from the first model.</p>"
        f"<table>{head}{''.join(rows)}</table>"
    )


def _best_cell(row: Json) -> str:
    text = f"{_cell(row)} <small>at {row['guidance_scale']:g}</small>"
    change = row.get("minus_first")
    return text if change is None else f"<small>{_change(change)}</small> {text}"


def _categories(tables: Tables, said: Json) -> str:
    parts = []
    point = tables.suite.points[0]
    for column in tables.columns():
        categories = column.prompt_set.categories
        if len(categories) > 1:
            series = {
                model.name: [
                    _whisker(_score(said, model.name, point, column, category)) for category in categories
                ]
                for model in tables.models
            }
            parts.append(f"<h3>{escape(column.title)}, {point}</h3>{svg.bars(categories, series)}")
    return f"<h2>By category</h2>{''.join(parts)}" if parts else ""


def _reasons(tables: Tables, said: Json) -> str:
    """What a scorer says beside its value: for GenEval the share of images that failed for each reason."""
    parts = []
    point = tables.suite.points[0]
    for column in tables.columns():
        values = tables.more_values(column)
        if values:
            rows = []
            for value in values:
                cells = [_cell(_score(said, model.name, point, column, "", value)) for model in tables.models]
                rows.append(_row([escape(value), *cells]))
            head = _row([escape(column.title), *(escape(model.name) for model in tables.models)], "th")
            parts.append(f"<table>{head}{''.join(rows)}</table>")
    return f"<h2>What the scorers say beside the score, {point}</h2>{''.join(parts)}" if parts else ""


def _distances(said: Json) -> str:
    if not said["distances"]:
        return ""
    keys = [key for key in said["distances"][0] if key not in ("model", "guidance_scale", "steps", "set")]
    rows = []
    for each in said["distances"]:
        point = Point(each["guidance_scale"], each["steps"])
        name = f"{escape(each['model'])}, {point}, {escape(each['set'])}"
        rows.append(_row([name, *(f"{each[key]:.4g}" for key in keys)]))
    return (
        '<h2>Distance to real images</h2><p class="note">All by InceptionV3; fid and kid: lower is better. They are of '
        "the whole set and depend on how many images it has.</p>"
        f"<table>{_row(['', *keys], 'th')}{''.join(rows)}</table>"
    )


def _drift(tables: Tables) -> str:
    measured = [(model, model.drift) for model in tables.models if model.drift is not None]
    if not measured:
        return ""
    first = measured[0][1]
    head = _row(["", *(escape(model.name) for model, _ in measured)], "th")
    rows = []
    for scale, spans in first["scales"].items():
        for i, span in enumerate(spans):
            each = [drift["scales"][scale][i] for _, drift in measured]
            cells = [
                f"{s['absolute']:.4g} <small>&plusmn; {s['standard_error']:.2g}, relative {s['relative']:.3f}</small>"
                for s in each
            ]
            rows.append(_row([f"guidance {scale}, noise {span['from']:g} to {span['to']:g}", *cells]))
    return (
        f'<h2>Exposure bias (drift)</h2><p class="note">The error of the velocity where {first["steps"]} of the '
        f"model's own sampler's steps lead, on {first['samples']} held-out samples; relative 1 is none. "
        "SOAR trains on something close to it, and the meter favours a run whose rollout had the meter's guidance.</p>"
        f"<table>{head}{''.join(rows)}</table>"
    )


def _training(tables: Tables) -> str:
    rows = []
    for model in tables.models:
        for number, run in enumerate(model.history):
            flops = "" if run["flops"] is None else f"{run['flops']:.3g}"
            before = "" if number == 0 else "after "
            rows.append(
                _row([f"{escape(model.name)}: {before}{escape(run['run'])}", escape(run["stage"]),
                      str(run["iterations"]), str(run["samples"]), flops])
            )  # fmt: skip
    if not rows:
        return ""
    head = _row(["", "stage", "steps", "samples", "floating point operations"], "th")
    return f"<h2>Training behind the weights</h2><table>{head}{''.join(rows)}</table>"


def _score(
    said: Json, model: str, point: Point, column: Column, category: str = "", value: str | None = None
) -> Json:
    """The row of one score."""
    wanted = {"model": model, "set": column.prompt_set.name, "scorer": column.scorer, "category": category}
    wanted["value"] = value or column.value
    return next(
        each for each in said["scores"]
        if _is_at(each, point) and all(each[key] == wanted[key] for key in wanted)
    )  # fmt: skip


def _is_at(row: Json, point: Point) -> bool:
    return Point(row["guidance_scale"], row["steps"]) == point


def _whisker(row: Json) -> svg.Whisker:
    return row["score"], row["low"], row["high"]


def _cell(row: Json) -> str:
    return f"{row['score']:.4g} <small>&plusmn; {row['standard_error']:.2g}</small>"


def _signed(row: Json) -> str:
    beyond = "" if row["low"] <= 0.0 <= row["high"] else ' class="beyond"'
    return f"<td{beyond}>{_change(row)}</td>"


def _change(row: Json) -> str:
    return f"{row['score']:+.3g} <small>&plusmn; {row['standard_error']:.2g}</small>"


def _row(cells: Sequence[Any], tag: str = "td", kind: str = "") -> str:
    """Cells are HTML already."""
    inner = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"
