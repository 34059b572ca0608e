"""Fine-tuning on several sigmas per sample: the control arm of SOAR, with its draws, sigmas and normalisation.

Every state lies on the ideal ray, so the rollout is the only difference between the two arms.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import base_rows, loss_weight, slowed, uniform
from soar_mega.stages.points import Points, concatenate
from soar_mega.stages.settings import SftMultiConfig
from soar_mega.stages.sft import Sft


class Span(NamedTuple):
    """From where to where rollouts go, and whether they end above time zero: each [B], or [P]."""

    sigma0: Tensor
    sigma1: Tensor
    has_step: Tensor


class SftMulti(Sft):
    """Flow matching on several sigmas per sample."""

    kinds = ("base", "aux")
    config: SftMultiConfig

    def points(self, batch: Batch) -> Points:
        """All base points, then the auxiliary points sample by sample."""
        return concatenate([super().points(batch), self._auxiliary_points(batch)])

    def _auxiliary_points(self, batch: Batch) -> Points:
        per_path, paths = self.config.num_auxiliary_points, self.config.num_rollout_paths
        sample = torch.arange(len(batch)).repeat_interleave(paths * per_path)
        path = torch.arange(paths).repeat_interleave(per_path).repeat(len(batch))
        span = self._rollout_span(batch)
        sigma = self._auxiliary_sigmas(batch, span.sigma1).flatten()
        span = Span(*(values[sample] for values in span))
        state_rows, target_rows = self._rows(batch, span, sample, path, self._noised(batch, sigma))
        present = (batch.valid[sample] & (span.has_step | (path == 0))).to(torch.float64)
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

    def _rows(
        self, batch: Batch, span: Span, sample: Tensor, path: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """State and target rows [P, 6] of auxiliary points, noised to `sigma`; `span` is that of each."""
        return base_rows(sigma)

    def _rollout_span(self, batch: Batch) -> Span:
        """Where the rollouts of a batch begin and end."""
        u0, length = self._time(batch), self._rollout_length(batch)
        sigma0 = self._sigma_at(u0)
        sigma1 = torch.minimum(self.schedule.rollout_end(u0, length), sigma0)
        return Span(sigma0, sigma1, u0 > length)

    def _rollout_length(self, batch: Batch) -> Tensor:
        """[B], in unshifted time: shares of the way from noise to data."""
        config = self.config
        if config.max_rollout_length is None:
            length = config.rollout_steps / config.sampling_steps
            return torch.full_like(batch.position, length, dtype=torch.float64)
        return config.max_rollout_length * uniform(batch.seed, "rollout_length", batch.position)[:, 0]

    def _auxiliary_sigmas(self, batch: Batch, sigma1: Tensor) -> Tensor:
        """s' ~ U[s1, s1 + ratio (1 - s1)] -> [B, paths, N]; the same draws for SOAR and its control arm."""
        start = sigma1[:, None, None]
        return start + self.config.sigma_upper_ratio * (1.0 - start) * self._per_point(batch, "auxiliary")

    def _noised(self, batch: Batch, sigma: Tensor) -> Tensor:
        """Where the auxiliary states are of which the model is told `sigma` [P]."""
        gamma = self.config.auxiliary_gamma
        return (
            sigma
            if gamma == 0
            else slowed(sigma, gamma, self._per_point(batch, "auxiliary_slowed").flatten())
        )

    def _per_point(self, batch: Batch, stream: str) -> Tensor:
        """Uniform numbers [B, paths, N]."""
        per_path, paths = self.config.num_auxiliary_points, self.config.num_rollout_paths
        draws = [uniform(batch.seed, stream, batch.position, path, per_path) for path in range(paths)]
        return torch.stack(draws, dim=1)
