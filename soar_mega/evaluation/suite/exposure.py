"""Drift beside the scores: the exposure bias of a model at each span of noise and each guidance scale."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from soar_mega.data.batch import on_device
from soar_mega.data.shards import ShardSet
from soar_mega.evaluation.drift import TOGETHER, DriftResult, held_out_drift, span_facts
from soar_mega.evaluation.generate import Generator
from soar_mega.evaluation.suite.one_model import Place
from soar_mega.evaluation.suite.suite_settings import DriftSettings

SEED = 0  # of noise and latents

Errors = list[list[list[float]]]  # by span: at the sampler's states and on the ray, of each sample


def measure_drift(
    generator: Generator, shards: ShardSet, settings: DriftSettings, scales: Sequence[float], place: Place
) -> dict[str, Any]:
    """Drift of held-out samples, each replica a share of them -> plain values on every rank. Collective."""
    groups = shards.one_bucket_groups(settings.samples, TOGETHER)
    own = list(range(len(groups)))[place.replica :: place.replicas]
    found: dict[str, list[dict[str, Any]]] = {}
    for scale in scales:
        mine = {number: _errors(generator, shards, groups[number], settings, scale) for number in own}
        everyone: list[dict[int, Errors]] = [{}] * place.world_size
        dist.all_gather_object(everyone, mine if place.writes else {})
        by_group = {number: errors for part in everyone for number, errors in part.items()}
        found[f"{scale:g}"] = [
            span_facts(span, _joined([by_group[number][i] for number in range(len(groups))]))
            for i, span in enumerate(settings.spans)
        ]
    return {"steps": settings.steps, "samples": sum(map(len, groups)), "scales": found}


def _errors(
    generator: Generator, shards: ShardSet, group: list[int], settings: DriftSettings, scale: float
) -> Errors:
    batch = on_device(shards.batch(group, SEED))
    results = held_out_drift(
        generator.velocity, [batch], settings.spans, settings.steps, scale, generator.is_told
    )
    return [[result.error.tolist(), result.on_ray.tolist()] for result in results]


def _joined(parts: Sequence[list[list[float]]]) -> DriftResult:
    error, on_ray = (
        torch.tensor([value for part in parts for value in part[i]], dtype=torch.float64) for i in (0, 1)
    )
    return DriftResult(error=error, on_ray=on_ray)
