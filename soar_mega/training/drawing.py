"""Samples of one forward as a stage plans them, and what is kept of their steps."""

import torch
from torch import Tensor

from soar_mega.distributed import device
from soar_mega.flow import TIMESTEPS, normal, sample, sample_steps
from soar_mega.flow.samplers import Velocity
from soar_mega.stages.collecting import START_NOISE, STEP_NOISE, SamplingPlan, Trajectories


@torch.no_grad()
def draw(
    velocity: Velocity,
    plan: SamplingPlan,
    seed: int,
    position: Tensor,
    start: Tensor,
    latent_shape: tuple[int, int, int],
) -> Trajectories:
    """B samples from noise to clean latents; all noise is keyed by position.

    Args:
        position: [B] int64, places in the training sequence, on the CPU.
        start: [B] int64, the place whose starting noise a sample has: its own, or that of the first of its group.
    """
    latents = normal(seed, START_NOISE, start, 0, latent_shape, device())
    kept = _Kept(position, plan.kept, latent_shape)
    told = plan.timesteps / TIMESTEPS
    if not bool(plan.stochastic.any()):
        assert plan.kept.shape[1] == 0, "only stochastic steps are learned from"
        clean = sample(velocity, latents, plan.sigmas, plan.solver, told)
        return kept.trajectories(clean)

    def noise(step: int, samples: Tensor) -> Tensor:
        return normal(seed, STEP_NOISE, position[samples], step, latent_shape, device())

    for step in sample_steps(
        velocity, latents, plan.sigmas, plan.variant, plan.eta, plan.stochastic, noise, told
    ):
        kept.add(step.step, step.state, step.following, step.log_probability)
        latents = step.following
    return kept.trajectories(latents)


class _Kept:
    """The steps that a plan keeps, on the CPU."""

    def __init__(self, position: Tensor, steps: Tensor, latent_shape: tuple[int, int, int]) -> None:
        self._position, self._steps = position, steps  # [B], [B, T]
        self._state = torch.empty(*steps.shape, *latent_shape)
        self._following = torch.empty(*steps.shape, *latent_shape)
        self._log_probability = torch.empty(steps.shape, dtype=torch.float64)

    def add(self, step: int, state: Tensor, following: Tensor, log_probability: Tensor) -> None:
        """Keeps of a step [B, ...] what is wanted of it."""
        row, column = (self._steps == step).nonzero(as_tuple=True)
        if len(row):
            self._state[row, column] = state.cpu()[row]
            self._following[row, column] = following.cpu()[row]
            self._log_probability[row, column] = log_probability.cpu().double()[row]

    def trajectories(self, clean: Tensor) -> Trajectories:
        """With the clean latents [B, C, H, W]."""
        return Trajectories(
            position=self._position,
            clean=clean.cpu().float(),
            step=self._steps,
            state=self._state,
            following=self._following,
            log_probability=self._log_probability,
        )
