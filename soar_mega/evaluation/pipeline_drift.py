"""The drift of a finished pipeline's transformer.

Drift is what SOAR trains on, more or less, so read it beside a metric that no method trains on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.batch import on_device
from soar_mega.data.shards import ShardSet, open_shards
from soar_mega.evaluation.drift import SPANS, TOGETHER, held_out_drift, span_facts
from soar_mega.evaluation.generate import Generator


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How pipelines are measured, the same for all that are compared.

    Attributes:
        held_out: shard folder that no pipeline was trained on.
        shift: of the timesteps; None: each pipeline's own.
    """

    guidance_scales: Sequence[float] = (1.0, 4.5)
    seed: int = 0
    held_out: str = ""
    drift_spans: Sequence[Sequence[float]] = SPANS
    drift_samples: int = 128
    drift_steps: int = 5
    dtype: str = "fp32"
    shift: float | None = None


def measure_drift_alone(folder: str | Path, plan: Plan, adapters: str | Path = "") -> dict[str, Any]:
    """Of one pipeline folder, with adapters on its transformer if given, as plain values for JSON.

    Raises:
        ValueError: the held-out shards are of other encoders.
        FileNotFoundError: a folder is not there.
    """
    shards = open_shards(plan.held_out, str(folder))  # first: a wrong path is found before minutes pass
    generator = Generator.load(folder, plan.dtype, plan.shift, adapters)
    drift = drift_of(generator, shards, plan)
    return {"folder": str(folder), "adapters": str(adapters), "drift": drift}


def drift_of(generator: Generator, shards: ShardSet, plan: Plan) -> dict[str, Any]:
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
