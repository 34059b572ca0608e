"""What the methods that learn from their own samples share: their sampler's sigmas, guidance and further answers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import TIMESTEPS, Schedule, Spacing
from soar_mega.stages.advantages import advantages_of_all
from soar_mega.stages.collecting import SamplingPlan
from soar_mega.stages.collecting_settings import CollectingConfig
from soar_mega.stages.points import Further, Points, Queries


class LearningFromSamples:
    """The common part of such a stage.

    Args:
        shift, spacing: of the schedule.

    Attributes:
        sigmas: [n + 1] float64 of the sampler.
        timesteps: [n] float64, what the model is told while samples are drawn.
    """

    answer_weights = "current"
    config: CollectingConfig
    kinds: tuple[str, ...]
    observed: tuple[str, ...]  # by the loss, beside the distance from the reference

    def __init__(
        self,
        config: CollectingConfig,
        shift: float,
        spacing: Spacing = "constant",
    ) -> None:
        self.config = config
        self.schedule = Schedule(shift, spacing=spacing)
        self.keeps = config.kept_copies
        self.further: Mapping[str, Further] = {name: Further(name, self._states) for name in self.keeps}
        self.observes = (*self.observed, "kl") if "reference" in self.keeps else self.observed
        steps, is_linear = config.sampling_steps, config.sigma_grid == "linear"
        self.sigmas = (
            self.schedule.linear_sigmas(steps) if is_linear else self.schedule.inference_sigmas(steps)
        )
        self.timesteps = TIMESTEPS * self.sigmas[:-1]
        if config.integer_timesteps:  # cut off in the precision in which the trainers do it
            self.timesteps = (TIMESTEPS * self.sigmas[:-1].float()).floor().double()

    def queries(self, batch: Batch) -> Queries | None:
        """No state depends on an answer."""
        return None

    def advantages(self, rewards: Mapping[str, Tensor], prompt: Tensor) -> Tensor:
        """[N] float64 of a collection, not clipped. rewards: [N] float64 each; prompt: [N] int64, equal for a group."""
        return advantages_of_all(rewards, prompt, self.config)

    def blends(self, iteration: int, is_collection_over: bool) -> Mapping[str, float]:
        """Nothing that is kept follows the weights."""
        return {}

    def points(self, batch: Batch) -> Points:
        raise NotImplementedError

    def _plan(self, solver: str, stochastic: Tensor, kept: Tensor, variant: str, eta: float) -> SamplingPlan:
        return SamplingPlan(
            sigmas=self.sigmas,
            timesteps=self.timesteps,
            solver=solver,
            variant=variant,
            eta=eta,
            stochastic=stochastic,
            kept=kept,
            guidance_scale=self.config.guidance_scale,
            same_start=self.config.same_start,
        )

    def _points(
        self,
        row: Tensor,
        *,
        path: Tensor,
        sigma: Tensor,
        timestep: Tensor,
        rows: tuple[Tensor, Tensor],
        present: Tensor,
        extra: dict[str, Tensor],
        reads: dict[str, Tensor],
    ) -> Points:
        """Points [P] of one kind at rows of the batch; `rows` are those of states and targets, [P, 6] each."""
        counted = present.double()
        return Points(
            kinds=self.kinds,
            sample=row,
            path=path,
            kind=torch.zeros_like(row),
            query=torch.zeros_like(row),
            sigma=sigma,
            timestep=timestep,
            state_rows=rows[0],
            target_rows=rows[1],
            dropped=torch.zeros_like(row, dtype=torch.bool),
            weight=counted,
            count=counted,
            extra=extra,
            reads=reads,
            guidance_scale=self.config.learned_scale,
            detach_unconditional=self.config.detach_unconditional,
        )

    def _states(self, batch: Batch) -> Queries:
        """The states of the points, for other weights."""
        return self.points(batch).asked(unconditional=self.config.learned_scale != 1.0)

    def _answered(self, points: Points, name: str) -> Tensor:
        """The guided velocity [M, C, H, W] of a further answer."""
        found = points.answered[name]
        if found.uncond is None:
            return found.cond
        return found.uncond + self.config.learned_scale * (found.cond - found.uncond)

    def _clipped(self, advantage: Tensor) -> Tensor:
        clip = self.config.advantage_clip
        return advantage if clip is None else advantage.clamp(-clip, clip)


def known(latents: Tensor, judged: Tensor) -> Tensor:
    """Latents [R, C, H, W], zero where a sample was not judged [R]: it may be NaN, which no weight of 0 takes out."""
    return torch.where(judged[:, None, None, None], latents, 0.0)
