"""What is measured of a pipeline that draws canvases: benchmark and energy distance of its images, and its drift.

Drift is what SOAR trains on, more or less, so it is never reported alone.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.prompts import EncodedPrompts, encode_prompts
from soar_mega.data.shards import open_shards
from soar_mega.evaluation import pipeline_drift
from soar_mega.evaluation.generate import Generator
from soar_mega.examples.digits.benchmark import Result, benchmark_prompts, real_canvases, score
from soar_mega.examples.digits.canvases import CANVAS
from soar_mega.examples.digits.energy import energy_to_real
from soar_mega.examples.digits.verifier import Verifier
from soar_mega.models.common.build import DTYPES


@dataclass(frozen=True, kw_only=True)
class Plan(pipeline_drift.Plan):
    """How pipelines are measured, the same for all that are compared. Without held-out shards there is no drift."""

    steps: int = 20
    prompts_per_category: int = 60


def measure(folder: str | Path, plan: Plan, adapters: str | Path = "") -> dict[str, Any]:
    """All measurements of one pipeline folder, with adapters on its transformer if given, as plain values for JSON.

    Raises:
        ValueError: it draws no canvases, or the held-out shards are of other encoders.
    """
    # first: a wrong path is found before minutes pass
    shards = open_shards(plan.held_out, str(folder)) if plan.held_out else None
    resolution = encoder_facts(Path(folder)).default_resolution
    if resolution != CANVAS:
        raise ValueError(
            f"{folder} draws {resolution} pixels and canvases have {CANVAS}: `soar-mega evaluate` measures any pipeline"
        )
    # text encoders are there for images alone, and gone before the transformer comes
    texts = [prompt.text for prompt in benchmark_prompts(plan.prompts_per_category)]
    prompts = encode_prompts(folder, texts, DTYPES[plan.dtype])
    generator = Generator.load(folder, plan.dtype, plan.shift, adapters)
    scales = {f"{scale:g}": _images(generator, prompts, plan, scale) for scale in plan.guidance_scales}
    measured = {"folder": str(folder), "adapters": str(adapters), "guidance": scales}
    if shards is not None:
        measured["drift"] = pipeline_drift.drift_of(generator, shards, plan)
    return measured


def measure_real(plan: Plan) -> dict[str, Any]:
    """What the verifier makes of real canvases: the ceiling of the benchmark, and the verifier's own accuracy."""
    verifier = Verifier.fit()
    prompts = benchmark_prompts(plan.prompts_per_category)
    result = score(real_canvases(prompts), prompts, verifier)
    return {"verifier_accuracy": verifier.accuracy(), "benchmark": result_to_json(result)}


def result_to_json(result: Result) -> dict[str, Any]:
    """{"overall" | "ocr" | category: {"mean", "count", "standard_error"}}."""
    named = {"overall": result.overall, **result.categories, "ocr": result.ocr}
    return {name: dataclasses.asdict(value) for name, value in named.items()}


def _images(
    generator: Generator, prompts: EncodedPrompts, plan: Plan, guidance_scale: float
) -> dict[str, Any]:
    images = generator.images(
        prompts,
        steps=plan.steps,
        guidance_scale=guidance_scale,
        seed=plan.seed,
        batch_size=128,
    )
    energy = energy_to_real(images, per_category=plan.prompts_per_category)
    return {
        "benchmark": result_to_json(score(images, benchmark_prompts(plan.prompts_per_category))),
        "energy_distance": {"value": energy.value, "standard_error": energy.standard_error},
    }
