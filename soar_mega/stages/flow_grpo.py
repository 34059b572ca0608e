"""Flow-GRPO: samples are drawn with stochastic steps, and steps that led to better rewards are made more probable.

Per step from x to x' that a sample is learned from, with A its advantage and rho the ratio of the step's probability
now to that under the weights that drew it:

    max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) + kl_beta distance from the reference

Liu et al., arXiv 2505.05470. The rows of its batch are the states of a sample's steps, rising; behind steps that are
not followed by another one stands the state that they led to. So the row behind a step's state is where it led.
"""

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import (
    SOURCES,
    Spacing,
    normal,
    rollout_coefficients,
    spread,
    step_log_probability,
    step_mean,
)
from soar_mega.flow.rollout import Coefficients
from soar_mega.stages.collecting import STEP_NOISE, Experience, SamplingPlan, Trajectories
from soar_mega.stages.collecting_settings import FlowGrpoConfig
from soar_mega.stages.learning_from_samples import LearningFromSamples, known
from soar_mega.stages.points import Points
from soar_mega.stages.stochastic_steps import learned_steps, stochastic_steps

FOLLOWS = -1  # the step of a row that no step is learned from


class FlowGrpo(LearningFromSamples):
    """The Flow-GRPO stage."""

    kinds: tuple[str, ...] = ("step",)
    collect_weights = "current"
    observed = ("ratio", "clipped", "approx_kl")
    config: FlowGrpoConfig

    def __init__(self, config: FlowGrpoConfig, shift: float, spacing: Spacing = "constant") -> None:
        super().__init__(config, shift, spacing)
        self.replayed = config.old_log_probabilities == "replayed"

    def plan(self, seed: int, position: Tensor) -> SamplingPlan:
        """Samples by the settings."""
        stochastic = stochastic_steps(self.config, seed, position)
        kept = learned_steps(self.config, seed, position)
        return self._plan("euler", stochastic, kept, self.config.variant, self.config.eta)

    def experience(self, drawn: Trajectories, advantages: Tensor) -> Experience:
        """The rows of B samples: see above. advantages: [B] float64, NaN where a sample could not be judged."""
        count, steps = drawn.step.shape
        behind = torch.ones(count, steps, dtype=torch.bool)  # steps that no other one follows
        behind[:, :-1] = drawn.step[:, 1:] != drawn.step[:, :-1] + 1
        both = torch.stack([drawn.state, drawn.following], dim=2).flatten(0, 2)
        is_row = torch.stack([torch.ones_like(behind), behind], dim=2)
        step = torch.stack([drawn.step, torch.full_like(drawn.step, FOLLOWS)], dim=2)
        old = torch.stack([drawn.log_probability, torch.zeros_like(drawn.log_probability)], dim=2).flatten()
        rows = is_row.flatten()
        sample = torch.arange(count)[:, None, None].expand_as(is_row).flatten()[rows]
        judged = advantages.isfinite()[sample]
        collected = {
            "advantage": advantages[sample],
            "position": drawn.position[sample],
            "step": step.flatten()[rows],
            "old_log_probability": torch.where(judged, old[rows], 0.0),
        }
        return Experience(latents=known(both[rows], judged), sample=sample, collected=collected)

    def points(self, batch: Batch) -> Points:
        """One per step that is learned from."""
        row = (batch.collected["step"] != FOLLOWS).nonzero().flatten()
        collected = {name: column[row] for name, column in batch.collected.items()}
        step = collected["step"]
        sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
        coefficients = rollout_coefficients(self.config.variant, sigma, sigma_next, self.config.eta)
        advantage = self._clipped(collected["advantage"])
        present = batch.valid[row] & collected["advantage"].isfinite()
        if self.config.drop_zero_advantages:
            present &= advantage != 0
        # the state is the row itself, and so is what the loss is given as the target
        rows = torch.zeros(len(row), len(SOURCES), dtype=torch.float64)
        rows[:, SOURCES.index("z0")] = 1.0
        queries = torch.arange(len(row))
        return self._points(
            row,
            path=torch.zeros_like(row),
            sigma=sigma,
            timestep=self.timesteps[step],
            rows=(rows, rows),
            present=present,
            extra={
                "advantage": torch.where(present, advantage, 0.0),
                "old_log_probability": collected["old_log_probability"],
                "following": row + 1,
                "coefficients": torch.stack(coefficients, dim=1),
                "length": sigma - sigma_next,
                "step": step,
                "position": collected["position"],
            },
            reads=dict.fromkeys(self.keeps, queries),
        )

    def loss(self, points: Points, velocity: Tensor) -> Tensor:
        """Of each point, [M] float32. velocity: [M, C, H, W], guided as samples are learned from."""
        config, extra = self.config, points.extra
        mean, log_probability = self._step(points, velocity)
        change = log_probability - extra["old_log_probability"].to(log_probability)
        ratio = (self._guarded(points, mean, change) if config.ratio == "guard" else change).exp()
        advantage = extra["advantage"].to(ratio)
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        if config.divide_by_step:
            loss = loss / extra["length"].to(loss)
        points.observed |= {
            "ratio": ratio.detach(),
            "clipped": (ratio.detach() != clipped.detach()).float(),
            "approx_kl": change.detach().square() / 2,
        }
        if not self.keeps:
            return loss
        kl = self._distance(points, velocity, mean)
        points.observed["kl"] = kl.detach()
        return loss + config.kl_beta * kl

    def log_probability(self, points: Points, velocity: Tensor) -> Tensor:
        """[M] float32 of each point's step under a velocity [M, C, H, W]."""
        return self._step(points, velocity)[1]

    def _step(self, points: Points, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [M, C, H, W] and log-probability [M] of each point's step."""
        mean = step_mean(_coefficients(points), points.targets(), velocity.float())
        std = points.extra["coefficients"][:, 2]
        return mean, step_log_probability(self.config.variant, std, self._following(points), mean)

    def _following(self, points: Points) -> Tensor:
        """The states [M, C, H, W] that the points' steps led to."""
        assert points.sources is not None
        return points.sources.z0.index_select(0, points.extra["following"])

    def _guarded(self, points: Points, mean: Tensor, change: Tensor) -> Tensor:
        """Log of GRPO-Guard's ratio: (change + mean (mu - mu_old)^2 / (2 C^2)) C, arXiv 2510.22319."""
        assert points.sources is not None and points.sources.targets is not None
        extra, following = points.extra, self._following(points)
        seed, std = points.sources.targets.seed, extra["coefficients"][:, 2].to(mean)
        noise = normal(seed, STEP_NOISE, extra["position"], extra["step"], mean.shape[1:])
        drawn_around = following - spread(std, mean) * noise
        bias = (mean - drawn_around).square().flatten(1).mean(dim=1) / (2 * std.square())
        return (change + bias) * std

    def _distance(self, points: Points, velocity: Tensor, mean: Tensor) -> Tensor:
        """[M] from the reference, as `FlowGrpoConfig.kl` says."""
        reference = self._answered(points, "reference")
        if self.config.kl == "velocity":
            return (velocity.float() - reference).square().flatten(1).mean(dim=1)
        others = step_mean(_coefficients(points), points.targets(), reference)
        squared = (mean - others).square().flatten(1).mean(dim=1)
        if self.config.kl == "latents":
            return squared
        # flow_grpo's std leaves out the length of a step, but not with cps
        variance = points.extra["coefficients"][:, 2].square()
        if self.config.variant != "cps":
            variance = variance / points.extra["length"]
        return squared / (2 * variance).to(squared)


def _coefficients(points: Points) -> Coefficients:
    """(A, B, C) of the points' steps, each [M] float64."""
    a, b, c = points.extra["coefficients"].unbind(dim=1)
    return a, b, c
