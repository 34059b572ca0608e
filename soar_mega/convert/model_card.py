"""README.md of an export: what it is, where it comes from, and how to draw with it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soar_mega

NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells beside the recipe.

    Attributes:
        weights: current or ema.
        products: of the model's family.
        lineage: lineage.json of the run; None where there is none.
        max_sequence_length: T5 tokens that the model was trained with; None where nobody knows.
        resolution: (width, height) of the images that it was trained on most.
    """

    weights: str
    products: str
    iteration: int | None = None
    lineage: dict[str, Any] | None = None
    max_sequence_length: int | None = None
    resolution: tuple[int, int] | None = None


def write_card(folder: Path, facts: CardFacts, recipe: str) -> None:
    """Write the card of a folder.

    Args:
        recipe: every setting of the run, as YAML; "" where nobody knows.
    """
    (folder / NAME).write_text(card(folder, facts, recipe), encoding="utf-8")


def card(folder: Path, facts: CardFacts, recipe: str) -> str:
    """The text of a card."""
    what = "the exponential moving average of the weights" if facts.weights == "ema" else "the weights"
    when = "" if facts.iteration is None else f" after {facts.iteration} iterations"
    parts = [
        f"# {facts.products}, post-trained with soar_mega",
        f"A diffusers folder with {what} of a training run{when}. Written by soar_mega {soar_mega.__version__}.",
        "## How to sample",
        *_sampling(facts),
        "## Where it comes from",
        *_lineage(facts.lineage),
    ]
    if recipe:
        parts += ["## Recipe", f"```yaml\n{recipe.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _sampling(facts: CardFacts) -> list[str]:
    settings = ["prompt"]
    command = ["soar-mega", "sample", "THIS_FOLDER", "--prompt", "..."]
    if facts.resolution is not None:
        width, height = facts.resolution
        settings += [f"width={width}", f"height={height}"]
        command += ["--size", f"{width}x{height}"]
    lines = []
    if facts.max_sequence_length is not None:
        length = str(facts.max_sequence_length)
        settings.append(f"max_sequence_length={length}")
        command += ["--max-sequence-length", length]
        lines.append(
            f"The model was trained with {length} T5 tokens per prompt. diffusers takes another number unless it is told: "
            "always pass max_sequence_length."
        )
    python = (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("THIS_FOLDER", torch_dtype=torch.bfloat16).to("cuda")\n'
        f'image = pipeline({", ".join(["\"...\"", *settings[1:]])}).images[0]'
    )
    return [*lines, f"```python\n{python}\n```", f"or\n\n```\n{shlex.join(command)}\n```"]


def _lineage(lineage: dict[str, Any] | None) -> list[str]:
    """A line for each run, the youngest first."""
    lines = []
    while lineage is not None:
        start = lineage["starts"][-1] if lineage.get("starts") else {}
        parent = lineage.get("parent")
        source = "random weights" if parent is None else f"{parent['path']} (sha256 {parent['sha256']})"
        lines.append(f"- a run of {start.get('code', 'unknown code')}, started {start.get('time', '?')}, from {source}")
        lineage = None if parent is None else parent.get("lineage")
    return ["\n".join(lines) or "Nothing is recorded of the run."]
