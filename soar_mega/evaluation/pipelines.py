"""What can be measured of a finished pipeline: benchmark and energy distance of its images, drift of its transformer.

Drift is what SOAR trains on, more or less, so it is never reported alone where another metric exists.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.batch import on_device
from soar_mega.data.canvases import CANVAS
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.prompts import EncodedPrompts, encode_prompts
from soar_mega.data.shards import ShardSet, open_shards
from soar_mega.evaluation.benchmark import Result, benchmark_prompts, real_canvases, score
from soar_mega.evaluation.drift import SPANS, TOGETHER, held_out_drift, span_facts
from soar_mega.evaluation.energy import energy_to_real
from soar_mega.evaluation.generate import Generator
from soar_mega.evaluation.verifier import Verifier
from soar_mega.models.common.build import DTYPES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How pipelines are measured, the same for all that are compared."""

    guidance_scales: Sequence[float] = (1.0, 4.5)
    steps: int = 20
    prompts_per_category: int = 60
    seed: int = 0
    held_out: str = ""  # shard folder for drift; empty: no drift
    drift_spans: Sequence[Sequence[float]] = SPANS
    drift_samples: int = 128
    drift_steps: int = 5
    dtype: str = "fp32"
    shift: float | None = None  # None: each pipeline's own


def evaluate_pipeline(folder: str | Path, plan: Plan, adapters: str | Path = "") -> dict[str, Any]:
    """All measurements of one pipeline folder, with adapters on its transformer if given, as plain values for JSON.

    The benchmark and the energy distance know canvases only; for another image size they are left out.

    Raises:
        ValueError: nothing can be measured: no canvases, and no held-out shards for drift.
    """
    # first: a wrong path is found before minutes pass
    shards = open_shards(plan.held_out, str(folder)) if plan.held_out else None
    resolution = encoder_facts(Path(folder)).default_resolution
    draws_canvases = resolution == CANVAS
    if not draws_canvases and shards is None:
        raise ValueError(
            f"{folder} draws {resolution} pixels and the benchmark reads {CANVAS}: "
            "name held-out shards (--held-out) to measure drift"
        )
    prompts = None
    if draws_canvases:
        # text encoders are there for images alone, and gone before the transformer comes
        texts = [prompt.text for prompt in benchmark_prompts(plan.prompts_per_category)]
        prompts = encode_prompts(folder, texts, DTYPES[plan.dtype])
    generator = Generator.load(folder, plan.dtype, plan.shift, adapters)
    measured: dict[str, Any] = {"folder": str(folder), "adapters": str(adapters)}
    if prompts is not None:
        measured["guidance"] = {
            f"{scale:g}": _images(generator, prompts, plan, scale) for scale in plan.guidance_scales
        }
    if shards is not None:
        measured["drift"] = _drift(generator, shards, plan)
    return measured


def evaluate_real(plan: Plan) -> dict[str, Any]:
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


def _drift(generator: Generator, shards: ShardSet, plan: Plan) -> dict[str, Any]:
    """At each guidance scale, its spans."""
    groups = shards.one_bucket_groups(plan.drift_samples, TOGETHER)
    scales = {}
    for scale in plan.guidance_scales:
        results = held_out_drift(
            generator.velocity,
            (on_device(shards.batch(group, plan.seed)) for group in groups),
            plan.drift_spans,
            plan.drift_steps,
            scale,
            generator.is_told,
        )
        scales[f"{scale:g}"] = [span_facts(span, result) for span, result in zip(plan.drift_spans, results)]
    return {"steps": plan.drift_steps, "samples": sum(map(len, groups)), "scales": scales}
