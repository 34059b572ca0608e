"""SOAR: train on the model's own one-step rollout errors, re-noised toward the noise they came from.

Per sample: a base point z_t on the ray at sigma0 (plain flow matching), one guided step of the current model to sigma1
without a gradient, and N auxiliary points per path between sigma1 and 1 whose target leads back to the clean latent:
v_corr = (z' - z0) / s'. Loss: (sum base + lambda sum auxiliary) / (n_base + lambda n_auxiliary). arXiv 2604.12617.
"""

from dataclasses import replace

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import auxiliary_rows, base_rows, correction_strength, rollout_coefficients
from soar_mega.stages.points import Points, Queries
from soar_mega.stages.settings import SoarConfig
from soar_mega.stages.sft_multi import SftMulti


class Soar(SftMulti):
    """The SOAR stage; with no auxiliary points it is supervised fine-tuning."""

    config: SoarConfig

    def __init__(self, config: SoarConfig, shift: float) -> None:
        super().__init__(config, shift)

    def queries(self, batch: Batch) -> Queries | None:
        """The base states: their guided velocity carries the rollout."""
        if self.config.num_auxiliary_points == 0:
            return None
        sigma0, sample = self._sigma0(batch), torch.arange(len(batch))
        rows, _ = base_rows(sigma0)
        return Queries(
            sample=sample,
            path=torch.zeros_like(sample),
            sigma=sigma0,
            timestep=self.schedule.timestep(sigma0),
            rows=rows,
            dropped=self._dropped(batch),
            unconditional=self.config.guidance_scale != 1.0,
            fused=self.config.fused_kernels,
        )

    def points(self, batch: Batch) -> Points:
        """As its control arm's; measured is the strength k of the correction, at auxiliary points."""
        points = super().points(batch)
        sigma0, sigma1, _ = (values[points.sample] for values in self._rollout_span(batch))
        strength = correction_strength(sigma0, sigma1, points.sigma)
        return replace(points, measured={"k": torch.where(points.of_kind("aux"), strength, torch.nan)})

    def _rows(self, sigma0: Tensor, sigma1: Tensor, sigma: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        """State and target rows [P, 6]: path 0 is the ODE step, further paths are stochastic."""
        ode = rollout_coefficients("ode", sigma0, sigma1, 0.0)
        noisy = rollout_coefficients(self.config.rollout_variant, sigma0, sigma1, self.config.eta)
        first = path == 0
        a, b, c = (torch.where(first, x, y) for x, y in zip(ode, noisy, strict=True))
        guidance, fresh = self.config.guidance_scale, self.config.fresh_endpoint
        return auxiliary_rows(sigma0, sigma1, sigma, guidance, (a, b, c), fresh_endpoint=fresh)
