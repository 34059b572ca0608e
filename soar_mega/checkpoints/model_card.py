"""README.md of an export: what it is, where it comes from, and how to draw with it."""

import json
from pathlib import Path
from typing import Any

import yaml

import soar_mega
from soar_mega.checkpoints.lineage import FILE as LINEAGE
from soar_mega.checkpoints.run_folder import RECIPE, RunFolder
from soar_mega.data.info import DatasetInfo, bucket_size
from soar_mega.data.shard_writer import DATASET_FILE
from soar_mega.user_files import read_object


def card_of_run(run: RunFolder, products: str, iteration: int, weights: str) -> str:
    """The text of a card.

    Args:
        products: of the model's family.
        weights: which of the run's: current or ema.
    """
    recipe = run.path / RECIPE
    settings = recipe.read_text() if recipe.is_file() else ""
    what = "the exponential moving average of the weights" if weights == "ema" else "the weights"
    parts = [
        f"# {products}, trained further with soar_mega",
        f"A diffusers folder with {what} of a run after {iteration} iterations, written by soar_mega "
        f"{soar_mega.__version__}.",
        "## How to sample",
        *_sampling(_info(yaml.safe_load(settings) or {})),
        "## Where it comes from",
        _lineage(run.path / LINEAGE),
    ]
    if settings:
        parts += ["## Recipe", f"```yaml\n{settings.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _sampling(info: DatasetInfo | None) -> list[str]:
    arguments, options, lines = ['"..."'], "", []
    if info is not None:
        length = info.max_sequence_length
        width, height = bucket_size(info.largest_bucket)
        arguments += [f"width={width}", f"height={height}", f"max_sequence_length={length}"]
        options = f" --size {width}x{height} --max-sequence-length {length}"
        lines.append(
            f"The model was trained with {length} T5 tokens for a prompt. diffusers takes another number unless it is "
            "told: always pass max_sequence_length."
        )
    python = [
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("this folder")',
        f"image = pipeline({', '.join(arguments)}).images[0]",
    ]
    command = f'soar-mega sample "this folder" --prompt "..."{options}'
    return [*lines, "```python\n" + "\n".join(python) + "\n```", f"```bash\n{command}\n```"]


def _info(settings: dict[str, Any]) -> DatasetInfo | None:
    """What the run's data set says; None where it is not there any more."""
    path = Path(settings.get("data", {}).get("path", ""), DATASET_FILE)
    try:
        return DatasetInfo.from_json(read_object(path), path)
    except ValueError:
        return None


def _lineage(path: Path) -> str:
    """A line for each run, the youngest first."""
    lineage = json.loads(path.read_text()) if path.is_file() else None
    lines = []
    while lineage is not None:
        parent, starts = lineage["parent"], lineage["starts"]
        source = "random weights" if parent is None else f"{parent['path']} (SHA-256 {parent['sha256']})"
        lines.append(f"- a run with soar_mega {starts[0]['code']}, begun {starts[0]['time']}, from {source}")
        lineage = parent and parent["lineage"]
    return "\n".join(lines) or "Nothing was recorded."
