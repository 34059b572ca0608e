"""What a training method that learns from its own samples says about them (reinforcement learning).

A collection is N = prompts_per_collection x images_per_prompt samples, which are drawn, judged and then learned from in
N / global_batch_size updates (or several times as many). Sample i belongs to update i // global_batch_size, and there
to the replica that global batches are cut for: so a replica draws what it learns from, and only rewards travel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from soar_mega.stages.points import Stage

START_NOISE = "collect"  # streams of the noise that samples are drawn with
STEP_NOISE = "collect_step"


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How samples of one forward are drawn.

    Attributes:
        sigmas: [n + 1] float64, falling from the first state to 0.
        timesteps: [n] float64, what the model is told at the first n of them.
        solver: of the deterministic steps: euler | heun | dpm++2m.
        variant, eta: of the stochastic steps, as in `soar_mega.flow.rollout_coefficients`.
        stochastic: [B, n] bool, the steps of each sample that are stochastic. Each sample has equally many.
        kept: [B, T] int64, rising: the steps of each sample that are learned from; T = 0 keeps clean latents alone.
        guidance_scale: 1 asks the conditional branch alone.
        same_start: the samples of a prompt start from the same noise.

    A sample starts from normal(seed, START_NOISE, position, 0), position being the first of its prompt where they share
    it; a stochastic step adds normal(seed, STEP_NOISE, position, step).
    """

    sigmas: Tensor
    timesteps: Tensor
    solver: str
    variant: str
    eta: float
    stochastic: Tensor
    kept: Tensor
    guidance_scale: float
    same_start: bool


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """What is left of B samples when they are drawn, on the CPU.

    Attributes:
        position: [B] int64, their places in the training sequence, which keyed their noise.
        clean: [B, C, H, W] float32, the latents at sigma 0.
        step: [B, T] int64, the steps that are kept.
        state, following: [B, T, C, H, W] float32, before and after such a step.
        log_probability: [B, T] float64, of the step under the weights that drew it.
    """

    position: Tensor
    clean: Tensor
    step: Tensor
    state: Tensor
    following: Tensor
    log_probability: Tensor


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What is learned from, as the rows of a batch: `soar_mega.data.batch.Batch` has the same tensors.

    Attributes:
        latents: [R, C, H, W] float32.
        sample: [R] int64, the sample that a row is of: it has its position, its prompt and its validity.
        collected: [R] each, what the points of the method are made of, by name; float64 or int64.
    """

    latents: Tensor
    sample: Tensor
    collected: dict[str, Tensor] = field(default_factory=dict)


class CollectingStage(Stage, Protocol):
    """A method that learns from samples of its own: pure functions, like those of `Stage`."""

    collect_weights: str  # which draw the samples: current, or a name of `kept`
    replayed: bool  # old log-probabilities are computed again, in the shape of the training forward

    def plan(self, seed: int, position: Tensor) -> SamplingPlan:
        """For samples at `position` [B] of the training sequence."""
        ...

    def advantages(self, rewards: Mapping[str, Tensor], prompt: Tensor) -> Tensor:
        """[N] float64 of the whole collection.

        Args:
            rewards: [N] float64 of each by its name, in the order of the settings, and their TOTAL.
            prompt: [N] int64, equal for a group.
        """
        ...

    def experience(self, drawn: Trajectories, advantages: Tensor) -> Experience:
        """The rows to learn from. advantages: [B] float64, NaN where a sample could not be judged."""
        ...

    def log_probability(self, points: object, velocity: Tensor) -> Tensor:
        """[M] float32 of each point's step under a velocity, where `replayed`."""
        ...
