"""What stands beside the parts of an export: what it is, where it comes from, and how to draw with it.

README.md is for people, training_facts.json for programs.
"""

from pathlib import Path
from typing import Any

import soar_mega
from soar_mega.checkpoints.lineage import FILE as LINEAGE
from soar_mega.checkpoints.lineage import read_lineage
from soar_mega.checkpoints.recipes import read_settings
from soar_mega.checkpoints.run_folder import RECIPE, RunFolder
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.info import bucket_size
from soar_mega.data.remote import read_info
from soar_mega.models.common.sizes import Sizes
from soar_mega.training_facts import FILE, TrainingFacts

CARD = "README.md"

Samples = tuple[int | None, int | None, int | None]  # T5 tokens, width, height


def notes_of_run(
    run: RunFolder, sizes: Sizes, iteration: int, weights: str, dtype: str | None = None
) -> dict[str, str]:
    """Texts by file name.

    Args:
        sizes: of the model.
        weights: which of the run's: current or ema.
        dtype: of the exported numbers: fp32, bf16 or fp16; None is that of the run.
    """
    recipe = run.path / RECIPE
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    settings = read_settings(run)
    trained_dtype = settings.get("model", {}).get("dtype")
    length, width, height = _trained_with(settings)
    facts = TrainingFacts(
        dtype=dtype or trained_dtype or "fp32",
        trained_dtype=trained_dtype,
        max_sequence_length=length,
        width=width,
        height=height,
        stage=settings.get("stage", {}).get("name"),
        iteration=iteration,
        weights=weights,
    )
    told = settings.get("stage", {}).get("guidance_scale") if sizes.guidance_embeds else None
    return {CARD: _card(run, sizes.family.products, text, facts, told), FILE: facts.to_json()}


def _card(
    run: RunFolder, products: str, recipe: str, facts: TrainingFacts, guidance_scale: float | None
) -> str:
    iteration, weights = facts.iteration, facts.weights
    what = "the exponential moving average of the weights" if weights == "ema" else "the weights"
    parts = [
        f"# {products}, trained further with soar_mega",
        f"A diffusers folder with {what} of a run after {iteration} iterations, written by soar_mega "
        f"{soar_mega.__version__}.",
        "## How to sample",
        *_sampling(facts, guidance_scale),
        "## Where it comes from",
        _lineage(run.path / LINEAGE),
    ]
    if recipe:
        parts += ["## Recipe", f"```yaml\n{recipe.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _sampling(facts: TrainingFacts, guidance_scale: float | None) -> list[str]:
    """guidance_scale: that the model was told in training; None: it is told none."""
    arguments, options, lines = ['"..."'], "", []
    length, width, height = facts.max_sequence_length, facts.width, facts.height
    if length is not None:
        arguments += [f"width={width}", f"height={height}", f"max_sequence_length={length}"]
        options = f" --size {width}x{height} --max-sequence-length {length}"
        lines.append(
            f"The model was trained with {length} T5 tokens for a prompt. diffusers takes another number unless it is "
            f"told: always pass max_sequence_length. soar-mega takes it from {FILE}."
        )
    if guidance_scale is not None:
        arguments.append(f"guidance_scale={guidance_scale:g}")
        options += f" --guidance-scale {guidance_scale:g}"
        lines.append(f"In training it was told a guidance scale of {guidance_scale:g}.")
    python = [
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("this folder")',
        f"image = pipeline({', '.join(arguments)}).images[0]",
    ]
    command = f'soar-mega sample "this folder" --prompt "..."{options}'
    return [*lines, "```python\n" + "\n".join(python) + "\n```", f"```bash\n{command}\n```"]


def _trained_with(settings: dict[str, Any]) -> Samples:
    """(T5 tokens, width, height) as the run's data set says, or as its own samples were drawn.

    None where the data set is not there any more.
    """
    data = settings.get("data", {})
    if data.get("prompts"):
        pipeline, length = settings["model"]["pipeline_dir"], data.get("max_sequence_length")
        return _drawn_with(pipeline, length, data.get("resolution"))
    if not data.get("path"):
        return None, None, None
    try:
        info = read_info(data["path"])
    except ValueError:
        return None, None, None
    return info.max_sequence_length, *bucket_size(info.largest_bucket)


def _drawn_with(pipeline_dir: str, length: int | None, size: int | list[int] | None) -> Samples:
    """As the recipe says, and where it says nothing as the pipeline does, if that is still there."""
    try:
        facts = encoder_facts(Path(pipeline_dir), length)
    except ValueError:
        width, height = (size, size) if isinstance(size, int) else size or (None, None)
        return length, width, height
    return facts.max_sequence_length, *facts.image_size(size)


def _lineage(path: Path) -> str:
    """A line for each run, the youngest first."""
    lineage = read_lineage(path) if path.is_file() else None
    lines = []
    while lineage is not None:
        parent, starts = lineage["parent"], lineage["starts"]
        source = "random weights" if parent is None else f"{parent['path']} (SHA-256 {parent.get('sha256')})"
        lines.append(f"- a run with soar_mega {starts[0]['code']}, begun {starts[0]['time']}, from {source}")
        lineage = parent and parent.get("lineage")
    return "\n".join(lines) or "Nothing was recorded."
