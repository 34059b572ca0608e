"""SOAR: train on the model's own one-step rollout errors, re-noised toward the noise they came from.

Per sample: a base point z_t on the ray at sigma0 (plain flow matching), one guided step (or several) of the current
model to sigma1 without a gradient, and N auxiliary points per path between sigma1 and 1 whose target leads back to the
clean latent: v_corr = (z' - z0) / s'. Loss: (sum base + lambda sum auxiliary) / (n_base + lambda n_auxiliary).
arXiv 2604.12617.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import (
    auxiliary_rows,
    balanced,
    base_rows,
    correction_strength,
    mixed_coefficients,
    rollout_coefficients,
)
from soar_mega.stages.points import Points, Queries, RolloutStep
from soar_mega.stages.scale import guided_share, parts
from soar_mega.stages.settings import SoarConfig
from soar_mega.stages.sft_multi import SftMulti, Span


class Soar(SftMulti):
    """The SOAR stage; with no auxiliary points it is supervised fine-tuning."""

    config: SoarConfig

    def queries(self, batch: Batch) -> Queries | None:
        """The base states: their guided velocity, or its mean over several steps, carries the rollout."""
        if self.config.num_auxiliary_points == 0:
            return None
        sigma0, sample = self._sigma0(batch), torch.arange(len(batch))
        rows, _ = base_rows(sigma0)
        share = guided_share(self.config.guidance_scale)
        return Queries(
            sample=sample,
            path=torch.zeros_like(sample),
            timestep=self.schedule.timestep(sigma0),
            rows=rows,
            then=tuple(self._further_steps(batch)),
            dropped=self._dropped(batch),
            unconditional=share == 1 if share in (0, 1) else self._guidance(batch) != 1,
            fused=self.config.fused_kernels,
        )

    def _further_steps(self, batch: Batch) -> Iterator[RolloutStep]:
        """The steps after the first, all equally long in unshifted time; by Euler, which a mean velocity sums up."""
        steps = self.config.rollout_steps
        u0, guidance = self._time(batch), self._guidance(batch)
        length = torch.minimum(self._rollout_length(batch), u0)
        sigma0 = self._sigma_at(u0)
        ends = [
            torch.minimum(self.schedule.rollout_end(u0, length * step / steps), sigma0)
            for step in range(1, steps + 1)
        ]
        for here, end in pairwise(ends):
            way = rollout_coefficients("ode", sigma0, here, 0.0)
            rows, _ = auxiliary_rows(sigma0, here, here, guidance, way)
            share = torch.where(end < sigma0, (here - end) / (sigma0 - end), 1.0)
            yield RolloutStep(self.schedule.timestep(here), rows, share)

    def points(self, batch: Batch) -> Points:
        """As its control arm's; measured is the strength k of the correction, at auxiliary points."""
        points = super().points(batch)
        auxiliary = points.of_kind("aux")
        sample, sigma = points.sample[auxiliary], points.sigma[auxiliary]
        span = self._rollout_span(batch)
        strength = torch.full_like(points.sigma, torch.nan)
        strength[auxiliary] = correction_strength(
            span.sigma0[sample], span.sigma1[sample], self._noised(batch, sigma)
        )
        return replace(points, measured={"k": strength})

    def _rows(
        self, batch: Batch, span: Span, sample: Tensor, path: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """State and target rows [P, 6]: path 0 is the ODE step, further paths are stochastic."""
        config, guidance = self.config, self._guidance(batch)[sample]
        step = mixed_coefficients(config.rollout_variant, span.sigma0, span.sigma1, config.eta, path > 0)
        return auxiliary_rows(span.sigma0, span.sigma1, sigma, guidance, step, config.fresh_endpoint)

    def _guidance(self, batch: Batch) -> Tensor:
        """The guidance scale of each sample's rollout, [B] float64."""
        scale = self.config.guidance_scale
        if isinstance(scale, int | float):
            return torch.full_like(batch.position, scale, dtype=torch.float64)
        draws = balanced(batch.seed, "guidance", batch.position)
        if isinstance(scale, list):
            low, high = scale
            return low + (high - low) * draws
        scales, ends = zip(*parts(scale), strict=True)
        chosen = torch.searchsorted(torch.tensor(ends[:-1], dtype=torch.float64), draws)
        return torch.tensor(scales, dtype=torch.float64)[chosen]
