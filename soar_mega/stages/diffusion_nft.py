"""DiffusionNFT: clean samples of an old policy are learned from by how good they are, without a likelihood.

A clean sample x0 with advantage A is noised to x = (1 - t) x0 + t eps at sigmas of its sampler. With the velocity v,
the old policy's v_old and r = clip(A / (2 clip) + 1/2, 0, 1), the loss of a point is

    clip [r E(v+) + (1 - r) E(v-)] / beta + kl_beta mean (v - v_ref)^2,
    v+ = beta v + (1 - beta) v_old, v- = (1 + beta) v_old - beta v

where E(v) = mean (x - t v - x0)^2 / w with w = max(mean |x - t v - x0|, weight_floor), which gets no gradient. With the
target velocity u = eps - x0 of the point, x - t v - x0 = t (u - v). After a collection the old policy is moved toward
the weights. Zheng et al., arXiv 2509.16117.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import SOURCES, Spacing, spread, subset, uniform
from soar_mega.stages.collecting import Experience, SamplingPlan, Trajectories
from soar_mega.stages.collecting_settings import DiffusionNftConfig
from soar_mega.stages.learning_from_samples import LearningFromSamples, known
from soar_mega.stages.points import Points


class DiffusionNft(LearningFromSamples):
    """The DiffusionNFT stage."""

    kinds: tuple[str, ...] = ("noised",)
    collect_weights = "old"
    replayed = False
    observed = ("positive", "negative", "old_distance")
    config: DiffusionNftConfig

    def __init__(self, config: DiffusionNftConfig, shift: float, spacing: Spacing = "constant") -> None:
        super().__init__(config, shift, spacing)
        steps = self._last_level()
        if config.levels == "stratified" and config.num_levels > steps:
            raise ValueError(
                f"stage.num_levels={config.num_levels} with stage.levels=stratified: only {steps} steps of the sampler "
                f"lie before the last one with a sigma of at least stage.lowest_sigma={config.lowest_sigma}; set fewer "
                "levels, more stage.sampling_steps, or a lower sigma"
            )

    def plan(self, seed: int, position: Tensor) -> SamplingPlan:
        """Deterministic samples, of which the end is kept."""
        stochastic = torch.zeros(len(position), self.config.sampling_steps, dtype=torch.bool)
        kept = torch.zeros(len(position), 0, dtype=torch.int64)
        return self._plan(self.config.solver, stochastic, kept, "ode", 0.0)

    def experience(self, drawn: Trajectories, advantages: Tensor) -> Experience:
        """One row per sample. advantages: [B] float64, NaN where a sample could not be judged."""
        sample = torch.arange(len(drawn.clean))
        latents = known(drawn.clean, advantages.isfinite())
        return Experience(latents=latents, sample=sample, collected={"advantage": advantages})

    def points(self, batch: Batch) -> Points:
        """Of each sample, one at every level that it is learned at."""
        level = self._levels(batch)
        row = torch.arange(len(batch))[:, None].expand_as(level).flatten()
        path = torch.arange(level.shape[1]).expand_as(level).flatten()
        sigma = self.sigmas[level.flatten()]
        rows = torch.zeros(2, len(row), len(SOURCES), dtype=torch.float64)
        z0, eps = SOURCES.index("z0"), SOURCES.index("eps")
        rows[0, :, z0], rows[0, :, eps] = 1 - sigma, sigma
        rows[1, :, z0], rows[1, :, eps] = -1.0, 1.0
        advantage = batch.collected["advantage"][row]
        present = batch.valid[row] & advantage.isfinite()
        return self._points(
            row,
            path=path,
            sigma=sigma,
            timestep=self.schedule.timestep(sigma),
            rows=(rows[0], rows[1]),
            present=present,
            extra={"share": self._share(torch.where(present, advantage, 0.0)), "sigma": sigma},
            reads=dict.fromkeys(self.keeps, torch.arange(len(row))),
        )

    def loss(self, points: Points, velocity: Tensor) -> Tensor:
        """Of each point, [M] float32. velocity: [M, C, H, W], guided as samples are learned from."""
        config, velocity = self.config, velocity.float()
        old, target = self._answered(points, "old"), points.targets()
        sigma, share = points.extra["sigma"], points.extra["share"].to(velocity)
        positive = self._error(target - config.beta * velocity - (1 - config.beta) * old, sigma)
        negative = self._error(target - (1 + config.beta) * old + config.beta * velocity, sigma)
        assert config.advantage_clip is not None
        loss = config.advantage_clip / config.beta * (share * positive + (1 - share) * negative)
        points.observed |= {
            "positive": positive.detach(),
            "negative": negative.detach(),
            "old_distance": (velocity.detach() - old).square().flatten(1).mean(dim=1),
        }
        if "reference" not in self.keeps:
            return loss
        kl = (velocity - self._answered(points, "reference")).square().flatten(1).mean(dim=1)
        points.observed["kl"] = kl.detach()
        return loss + config.kl_beta * kl

    def log_probability(self, points: Points, velocity: Tensor) -> Tensor:
        """There is none."""
        raise NotImplementedError

    def blends(self, iteration: int, is_collection_over: bool) -> Mapping[str, float]:
        """After a collection, the old policy's decay."""
        config = self.config
        if not is_collection_over:
            return {}
        if config.old_decay == "constant":
            return {"old": config.old_decay_max}
        ramp = config.old_decay_rate * max(iteration - config.old_decay_start, 0)
        return {"old": min(ramp, config.old_decay_max)}

    def _levels(self, batch: Batch) -> Tensor:
        """[B, T] int64, rising: the steps of the sampler at whose sigmas a sample is learned from."""
        config = self.config
        count, size = config.num_levels, config.sampling_steps
        if config.levels == "first":
            return torch.arange(count).expand(len(batch), -1)
        if config.levels == "random":
            return subset(batch.seed, "levels", batch.position, size, count)
        bounds = torch.linspace(0, self._last_level(), count + 1, dtype=torch.float64).long()
        drawn = uniform(batch.seed, "levels", batch.position, count=count)
        return bounds[:-1] + (drawn * bounds.diff()).long()

    def _last_level(self) -> int:
        """The last step whose sigma is not below the lowest to learn at, where the last part ends."""
        return int((self.sigmas[:-1] >= self.config.lowest_sigma).sum()) - 1

    def _share(self, advantage: Tensor) -> Tensor:
        """r: how much of a sample the positive policy learns, [P] float64."""
        clip = self.config.advantage_clip
        assert clip is not None
        return (self._clipped(advantage) / (2 * clip) + 0.5).clamp(0, 1)

    def _error(self, off: Tensor, sigma: Tensor) -> Tensor:
        """E of a velocity that is off by `off` [M, C, H, W] from the target: [M]."""
        off = spread(sigma, off) * off
        weight = off.detach().abs().flatten(1).mean(dim=1).clamp(min=self.config.weight_floor)
        return off.square().flatten(1).mean(dim=1) / weight
