"""Fine-tuning on several sigmas per sample: the control arm of SOAR, with its draws, sigmas and normalisation.

Every state lies on the ideal ray, so the rollout is the only difference between the two arms.
"""

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import base_rows, loss_weight, uniform
from soar_mega.stages.points import Points, concatenate
from soar_mega.stages.settings import SftMultiConfig
from soar_mega.stages.sft import Sft


class SftMulti(Sft):
    """Flow matching on several sigmas per sample."""

    kinds = ("base", "aux")
    config: SftMultiConfig

    def __init__(self, config: SftMultiConfig, shift: float) -> None:
        super().__init__(config, shift)

    def points(self, batch: Batch) -> Points:
        """All base points, then the auxiliary points sample by sample."""
        base = super().points(batch)
        if self.config.num_auxiliary_points == 0:
            return base
        return concatenate([base, self._auxiliary_points(batch)])

    def _auxiliary_points(self, batch: Batch) -> Points:
        per_path, paths = self.config.num_auxiliary_points, self.config.num_rollout_paths
        sample = torch.arange(len(batch)).repeat_interleave(paths * per_path)
        path = torch.arange(paths).repeat_interleave(per_path).repeat(len(batch))
        span = self._rollout_span(batch)
        sigma = self._auxiliary_sigmas(batch, span[1]).flatten()
        sigma0, sigma1, has_step = (values[sample] for values in span)
        state_rows, target_rows = self._rows(sigma0, sigma1, sigma, path)
        present = (batch.valid[sample] & (has_step | (path == 0))).to(torch.float64)
        scale = present * self.config.auxiliary_weight
        return Points(
            kinds=self.kinds,
            sample=sample,
            path=path,
            kind=torch.ones_like(sample),
            query=sample,
            sigma=sigma,
            timestep=self.schedule.timestep(sigma),
            state_rows=state_rows,
            target_rows=target_rows,
            dropped=self._dropped(batch)[sample],
            weight=scale * loss_weight(self.config.loss_weighting, sigma),
            count=scale,
            fused=self.config.fused_kernels,
        )

    def _rows(self, sigma0: Tensor, sigma1: Tensor, sigma: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        """State and target rows [P, 6] of auxiliary points."""
        return base_rows(sigma)

    def _rollout_span(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """sigma0, sigma1 [B] and whether the step ends above time zero [B]."""
        steps = self.config.sampling_steps
        u0 = self._time(batch)
        sigma0 = self._sigma_at(u0)
        sigma1 = torch.minimum(self.schedule.rollout_end(u0, steps), sigma0)
        return sigma0, sigma1, u0 > 1.0 / steps

    def _auxiliary_sigmas(self, batch: Batch, sigma1: Tensor) -> Tensor:
        """s' ~ U[s1, s1 + ratio (1 - s1)] -> [B, paths, N]; the same draws for SOAR and its control arm."""
        per_path, paths = self.config.num_auxiliary_points, self.config.num_rollout_paths
        draws = [uniform(batch.seed, "auxiliary", batch.position, path, per_path) for path in range(paths)]
        start = sigma1[:, None, None]
        return start + self.config.sigma_upper_ratio * (1.0 - start) * torch.stack(draws, dim=1)
