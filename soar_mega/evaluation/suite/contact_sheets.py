"""Images of all models side by side, for the prompts about which their scores disagree most."""

import base64
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from soar_mega.evaluation.suite.prompt_sets import Task
from soar_mega.evaluation.suite.tables import Column, Tables

ROWS = 8
LARGEST = 224  # pixels of an image on the sheet


def contact_sheet(tables: Tables, column: Column) -> str:
    """The sheet of one column, at the table's point. With one model: the images that score lowest."""
    point = tables.suite.points[0]
    name = column.prompt_set.name
    values = [model.values[point, name][column.scorer] for model in tables.models]

    def of(task: Task) -> list[float]:
        return [each[task.name][column.value] for each in values]

    def order(task: Task) -> float:
        scores = of(task)
        return min(scores) - max(scores) if len(scores) > 1 else scores[0]

    rows = []
    for task in sorted(column.prompt_set.tasks, key=order)[:ROWS]:
        cells = [
            f'<td><img alt="" src="{_embedded(model.images[point, name].path(task.name))}">{score:.4g}</td>'
            for model, score in zip(tables.models, of(task), strict=True)
        ]
        rows.append(f"<tr><td>{escape(task.item.prompt)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(model.name)}</th>" for model in tables.models)
    what = "most disagreement" if len(values) > 1 else "lowest scores"
    return (
        f"<h2>{escape(column.title)}: {what}</h2>"
        f'<table class="sheet"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    )


def _embedded(path: Path) -> str:
    """An image as a data address; large ones are made smaller."""
    with Image.open(path) as picture:
        if max(picture.size) <= LARGEST:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        picture.thumbnail((LARGEST, LARGEST))
        content = BytesIO()
        picture.convert("RGB").save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
