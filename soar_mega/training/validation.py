"""What is measured on held-out samples while training: the loss by sigma quartile, and drift."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega import distributed
from soar_mega.config import LoggingConfig
from soar_mega.data.batch import Batch, on_device
from soar_mega.data.shards import ShardSet
from soar_mega.engines import Engine
from soar_mega.evaluation.drift import ModelVelocity, held_out_drift
from soar_mega.flow import Schedule, normal, uniform
from soar_mega.models.common.conditions import Conditions

SEED = 0  # not the run's: runs with different seeds are measured on the same states
QUARTILES = 4


class HeldOut:
    """Held-out shards and what is measured on them; every method is collective over the world.

    Args:
        batch_size: samples per forward.
        weights: which of the engine's weights are measured.
    """

    def __init__(self, shards: ShardSet, schedule: Schedule, batch_size: int, weights: str) -> None:
        self._shards = shards
        self._schedule = schedule
        self._batch_size = batch_size
        self._weights = weights

    def loss(self, engine: Engine, samples: int) -> dict[str, float]:
        """Mean loss over sigma, and over each quarter of (0, 1]: validation/loss, validation/loss_q1 to _q4."""
        totals = torch.zeros(QUARTILES + 1, dtype=torch.float64)
        with engine.using(self._weights):
            for batch in self._my_batches(samples):
                losses = quartile_losses(engine.velocity, batch, self._schedule)[batch.valid]
                totals[:-1] += losses.sum(dim=0).cpu()
                totals[-1] += len(losses)
        means = _shares(totals)
        named = {f"validation/loss_q{q + 1}": value for q, value in enumerate(means)}
        return {"validation/loss": sum(means) / QUARTILES, **named}

    def drift(self, engine: Engine, settings: LoggingConfig) -> dict[str, float]:
        """Drift of each span: drift/0.9-0.65, and relative to the error on the ray drift/0.9-0.65/relative."""
        spans, guidance_scale = settings.drift_spans, settings.sample_guidance_scale
        with engine.using(self._weights):
            batches = self._my_batches(settings.drift_samples)
            is_told = engine.model.sizes.guidance_embeds
            results = held_out_drift(
                engine.velocity, batches, spans, settings.drift_steps, guidance_scale, is_told
            )
        sums = [total.sum() for r in results for total in (r.error, r.on_ray)]
        means = _shares(torch.stack([*sums, torch.tensor(float(len(results[0].error)), dtype=torch.float64)]))
        values = {}
        for (sigma_a, sigma_b), error, on_ray in zip(spans, means[::2], means[1::2], strict=True):
            values[f"drift/{sigma_a:g}-{sigma_b:g}"] = error
            values[f"drift/{sigma_a:g}-{sigma_b:g}/relative"] = error / on_ray
        return values

    def _my_batches(self, samples: int) -> Iterator[Batch]:
        """This data-parallel rank's share of `samples` held-out samples, in as many batches as the others'.

        Forwards may be collective over the replicas. A rank that is left without a group of its own in the last round
        repeats the last group, with no valid sample.
        """
        groups = self._shards.one_bucket_groups(samples, self._batch_size)
        for first in range(0, len(groups), distributed.data_size()):
            mine = first + distributed.data_rank()
            batch = self._shards.batch(groups[min(mine, len(groups) - 1)], SEED)
            if mine >= len(groups):
                batch = dataclasses.replace(batch, valid=torch.zeros_like(batch.valid))
            yield on_device(batch)


def quartile_losses(velocity: ModelVelocity, batch: Batch, schedule: Schedule) -> Tensor:
    """Squared error of each sample at one keyed sigma in each quarter of (0, 1] -> [B, 4] float64.

    Sigma is uniform within its quarter and noise is keyed by (seed, position, quarter): nothing but the weights changes
    from one measurement to the next.
    """
    assert batch.latents is not None and batch.text is not None and batch.pooled is not None
    losses = []
    for quarter in range(QUARTILES):
        u = uniform(batch.seed, "validation/sigma", batch.position, quarter)[:, 0]
        sigma = ((quarter + u) / QUARTILES).clamp(min=schedule.sigma_min)
        z1 = normal(batch.seed, "validation/noise", batch.position, quarter, batch.latent_shape)
        s = sigma.float()[:, None, None, None]
        state = (1.0 - s) * batch.latents + s * z1
        error = velocity(state, sigma, Conditions(batch.text, batch.pooled)) - (z1 - batch.latents)
        losses.append(error.double().square().flatten(1).mean(dim=1))
    return torch.stack(losses, dim=1)


def _shares(totals: Tensor) -> list[float]:
    """Sums over samples and, last, their number -> means over the samples of all ranks.

    Ranks of one data-parallel replica hold the same numbers: summing over the world counts each equally often.
    """
    totals = totals.to(distributed.device())
    dist.all_reduce(totals)
    return (totals[:-1] / totals[-1]).tolist()
