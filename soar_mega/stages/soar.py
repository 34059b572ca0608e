"""SOAR: train on the model's own one-step rollout errors, re-noised toward the noise they came from.

Per sample: a base point z_t on the ray at sigma0 (plain flow matching), one guided step of the current model to sigma1
without a gradient, and N auxiliary points per path between sigma1 and 1 whose target leads back to the clean latent:
v_corr = (z' - z0) / s'. Loss: (sum base + lambda sum auxiliary) / (n_base + lambda n_auxiliary). arXiv 2604.12617.
"""

import torch
from torch import Tensor

from soar_mega.config import StageConfig
from soar_mega.data.batch import Batch
from soar_mega.flow import (
    Schedule,
    auxiliary_rows,
    base_rows,
    correction_strength,
    loss_weight,
    rollout_coefficients,
    sample_time,
    uniform,
)
from soar_mega.stages.points import Points, Queries, concatenate, squared_error


class Soar:
    """The SOAR stage; with no auxiliary points it is supervised fine-tuning."""

    answer_weights = "current"

    def __init__(self, config: StageConfig, shift: float) -> None:
        self.config = config
        self.schedule = Schedule(shift, grid=config.timesteps == "grid")

    def queries(self, batch: Batch) -> Queries | None:
        """The base states: their guided velocity carries the rollout."""
        if self.config.num_auxiliary_points == 0:
            return None
        sigma0, _, _ = self._rollout_span(batch)
        rows, _ = base_rows(sigma0)
        return Queries(
            sigma=sigma0,
            timestep=self.schedule.timestep(sigma0),
            rows=rows,
            dropped=self._dropped(batch),
            unconditional=self.config.guidance_scale != 1.0,
            fused=self.config.fused_kernels,
        )

    def points(self, batch: Batch) -> Points:
        """All base points, then the auxiliary points sample by sample."""
        parts = [self._base_points(batch)]
        if self.config.num_auxiliary_points > 0:
            parts.append(self._auxiliary_points(batch))
        return concatenate(parts)

    def loss(self, points: Points, velocity: Tensor) -> Tensor:
        """Mean squared error of velocity [M, C, H, W] per point -> [M] float32."""
        return squared_error(points, velocity)

    def _base_points(self, batch: Batch) -> Points:
        sigma, _, _ = self._rollout_span(batch)
        sample = torch.arange(len(batch))
        state_rows, target_rows = base_rows(sigma)
        present = batch.valid.to(torch.float64)
        return Points(
            sample=sample,
            path=torch.zeros_like(sample),
            sigma=sigma,
            timestep=self.schedule.timestep(sigma),
            state_rows=state_rows,
            target_rows=target_rows,
            dropped=self._dropped(batch),
            weight=present * loss_weight(self.config.loss_weighting, sigma),
            count=present,
            auxiliary=torch.zeros_like(batch.valid),
            strength=torch.zeros_like(sigma),
            fused=self.config.fused_kernels,
        )

    def _auxiliary_points(self, batch: Batch) -> Points:
        per_path, paths = self.config.num_auxiliary_points, self.config.num_rollout_paths
        sample = torch.arange(len(batch)).repeat_interleave(paths * per_path)
        path = torch.arange(paths).repeat_interleave(per_path).repeat(len(batch))
        sigma0, sigma1, has_step = (values[sample] for values in self._rollout_span(batch))
        sigma = self._auxiliary_sigmas(batch).flatten()
        state_rows, target_rows = self._rows(sigma0, sigma1, sigma, path)
        present = (batch.valid[sample] & (has_step | (path == 0))).to(torch.float64)
        scale = present * self.config.auxiliary_weight
        return Points(
            sample=sample,
            path=path,
            sigma=sigma,
            timestep=self.schedule.timestep(sigma),
            state_rows=state_rows,
            target_rows=target_rows,
            dropped=self._dropped(batch)[sample],
            weight=scale * loss_weight(self.config.loss_weighting, sigma),
            count=scale,
            auxiliary=torch.ones_like(present, dtype=torch.bool),
            strength=correction_strength(sigma0, sigma1, sigma),
            fused=self.config.fused_kernels,
        )

    def _rows(self, sigma0: Tensor, sigma1: Tensor, sigma: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        """State and target rows [P, 6]: path 0 is the ODE step, further paths are stochastic."""
        ode = rollout_coefficients("ode", sigma0, sigma1, 0.0)
        noisy = rollout_coefficients(self.config.rollout_variant, sigma0, sigma1, self.config.eta)
        first = path == 0
        a, b, c = (torch.where(first, x, y) for x, y in zip(ode, noisy, strict=True))
        guidance, fresh = self.config.guidance_scale, self.config.fresh_endpoint
        return auxiliary_rows(sigma0, sigma1, sigma, guidance, (a, b, c), fresh_endpoint=fresh)

    def _rollout_span(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """sigma0, sigma1 [B] and whether the step ends above time zero [B]."""
        config = self.config
        draws = uniform(batch.seed, "time", batch.position)[:, 0]
        u0 = sample_time(
            config.timestep_density, draws, config.logit_mean, config.logit_std, config.mode_scale
        )
        sigma0 = self.schedule.sigma(u0).clamp(min=self.schedule.sigma_min)
        sigma1 = torch.minimum(self.schedule.rollout_end(u0, config.sampling_steps), sigma0)
        return sigma0, sigma1, u0 > 1.0 / config.sampling_steps

    def _auxiliary_sigmas(self, batch: Batch) -> Tensor:
        """s' ~ U[s1, s1 + ratio (1 - s1)] -> [B, paths, N]; the same draws for SOAR and its control arm."""
        per_path, paths = self.config.num_auxiliary_points, self.config.num_rollout_paths
        _, sigma1, _ = self._rollout_span(batch)
        draws = [uniform(batch.seed, "auxiliary", batch.position, path, per_path) for path in range(paths)]
        start = sigma1[:, None, None]
        return start + self.config.sigma_upper_ratio * (1.0 - start) * torch.stack(draws, dim=1)

    def _dropped(self, batch: Batch) -> Tensor:
        return uniform(batch.seed, "dropout", batch.position)[:, 0] < self.config.condition_dropout
