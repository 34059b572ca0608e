"""Supervised fine-tuning: plain flow matching on the ideal ray, one point per sample.

What the other methods that train on samples have too is here: base points and their draws.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import Schedule, Spacing, base_rows, loss_weight, sample_time, uniform
from soar_mega.stages.points import Further, Points, Queries, squared_error
from soar_mega.stages.settings import SftConfig


class Sft:
    """Fine-tuning on the samples as they are."""

    kinds: tuple[str, ...] = ("base",)
    answer_weights = "current"
    further: Mapping[str, Further] = {}
    keeps: tuple[str, ...] = ()
    observes: tuple[str, ...] = ()

    def __init__(self, config: SftConfig, shift: float, spacing: Spacing = "constant") -> None:
        self.config = config
        self.schedule = Schedule(shift, grid=config.timesteps == "grid", spacing=spacing)

    def queries(self, batch: Batch) -> Queries | None:
        """Nothing has to be asked."""
        return None

    def points(self, batch: Batch) -> Points:
        """The base points, one per sample."""
        sigma = self._sigma0(batch)
        sample = torch.arange(len(batch))
        state_rows, target_rows = base_rows(self._state_sigma(batch, sigma))
        present = batch.valid.to(torch.float64)
        return Points(
            kinds=self.kinds,
            sample=sample,
            path=torch.zeros_like(sample),
            kind=torch.zeros_like(sample),
            query=sample,
            sigma=sigma,
            timestep=self.schedule.timestep(sigma),
            state_rows=state_rows,
            target_rows=target_rows,
            dropped=self._dropped(batch),
            weight=present * loss_weight(self.config.loss_weighting, sigma),
            count=present,
            fused=self.config.fused_kernels,
        )

    def loss(self, points: Points, velocity: Tensor) -> Tensor:
        """Mean squared error of velocity [M, C, H, W] per point -> [M] float32."""
        return squared_error(points, velocity)

    def blends(self, iteration: int, is_collection_over: bool) -> Mapping[str, float]:
        """Nothing is kept."""
        return {}

    def _state_sigma(self, batch: Batch, sigma: Tensor) -> Tensor:
        """Where on the ray the states are of which the model is told `sigma` [B]."""
        return sigma

    def _time(self, batch: Batch) -> Tensor:
        """Unshifted time u0 [B] of the base points."""
        config = self.config
        draws = uniform(batch.seed, "time", batch.position)[:, 0]
        return sample_time(
            config.timestep_density, draws, config.logit_mean, config.logit_std, config.mode_scale
        )

    def _sigma0(self, batch: Batch) -> Tensor:
        return self._sigma_at(self._time(batch))

    def _sigma_at(self, u0: Tensor) -> Tensor:
        return self.schedule.sigma(u0).clamp(min=self.schedule.sigma_min)

    def _dropped(self, batch: Batch) -> Tensor:
        return uniform(batch.seed, "dropout", batch.position)[:, 0] < self.config.condition_dropout
