"""Drift, the exposure-bias meter: how wrong the model is at states that its own sampler reaches.

From a held-out state on the ray at sigma a, n guided Euler steps lead to z_b at sigma b. There the velocity that would
lead back to the clean latent is (z_b - z0)/b; drift is the per-element mean of |v_cond(z_b) - (z_b - z0)/b|^2. The same
error at the state on the ray at b (same z0, z1 and condition) is what the model would show without exposure bias: the
ratio of the two is the relative drift. SOAR trains on something close to drift, so read it only beside a metric that no
method trains on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import guided, normal, sample
from soar_mega.models.common.conditions import Conditions

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents [B, C, H, W], sigma [B]) -> [B, C, H, W]
ModelVelocity = Callable[[Tensor, Tensor, Conditions], Tensor]  # the same, with conditions [B]

SPANS = ((0.9, 0.65), (0.75, 0.5), (0.5, 0.25))  # that are measured, in sigma
TOGETHER = 32  # samples whose velocities are predicted together


@dataclass(frozen=True, kw_only=True)
class DriftResult:
    """Squared errors per sample, each a mean over the elements of a latent."""

    error: Tensor  # [B] float64, at the states that the sampler reached
    on_ray: Tensor  # [B] float64, at the states on the ray

    @property
    def absolute(self) -> float:
        """Mean error at the sampler's states."""
        return self.error.mean().item()

    @property
    def relative(self) -> float:
        """Mean error at the sampler's states over mean error on the ray; 1 means no exposure bias."""
        return (self.error.mean() / self.on_ray.mean()).item()

    @property
    def standard_error(self) -> float:
        """Standard error of `absolute` over the samples."""
        return (self.error.std() / len(self.error) ** 0.5).item()


def drift(
    velocity_cond: Velocity,
    velocity_uncond: Velocity | None,
    z0: Tensor,  # [B, C, H, W]
    z1: Tensor,  # [B, C, H, W]
    sigma_a: float,
    sigma_b: float,
    steps: int,
    guidance_scale: float,
) -> DriftResult:
    """Drift of `steps` guided Euler steps, equal in sigma, from sigma_a down to sigma_b.

    Args:
        velocity_uncond: not called, and may be None, at guidance scale 1.
        z0, z1: clean latents and noise endpoints, float32.

    Raises:
        ValueError: unless 1 >= sigma_a > sigma_b > 0 and steps >= 1.
    """
    if not 1.0 >= sigma_a > sigma_b > 0.0:
        raise ValueError(f"drift span: sigma must fall within (0, 1], not go from {sigma_a} to {sigma_b}")
    if steps < 1:
        raise ValueError(f"drift steps: at least 1 is needed, not {steps}")
    sigmas = torch.linspace(sigma_a, sigma_b, steps + 1, dtype=torch.float64)
    start = (1.0 - sigma_a) * z0 + sigma_a * z1
    reached = sample(guided(velocity_cond, velocity_uncond, guidance_scale), start, sigmas)
    ideal = (1.0 - sigma_b) * z0 + sigma_b * z1
    return DriftResult(
        error=_return_error(velocity_cond, reached, z0, sigma_b),
        on_ray=_return_error(velocity_cond, ideal, z0, sigma_b),
    )


def _return_error(velocity: Velocity, state: Tensor, z0: Tensor, sigma: float) -> Tensor:
    """Mean over elements of |v(z) - (z - z0)/sigma|^2 -> [B] float64."""
    predicted = velocity(state, torch.full((len(state),), sigma, dtype=torch.float64, device=state.device))
    target = (state.double() - z0.double()) / sigma
    return (predicted.double() - target).square().flatten(1).mean(dim=1)


def held_out_drift(
    velocity: ModelVelocity,
    batches: Iterable[Batch],
    spans: Sequence[Sequence[float]],  # [(sigma_a, sigma_b), ...]
    steps: int,
    guidance_scale: float,
    is_told: bool = False,
) -> list[DriftResult]:
    """Drift of the valid samples of held-out batches, one result per span.

    is_told: the model is guidance-distilled.

    The noise endpoint is keyed by (seed, "drift", position), so that every model and every step of training is measured
    on the same states.
    """
    cfg_scale = 1.0 if is_told else guidance_scale
    parts: list[list[DriftResult]] = [[] for _ in spans]
    for batch in batches:
        assert batch.latents is not None and batch.text is not None and batch.pooled is not None
        assert batch.empty_text is not None and batch.empty_pooled is not None
        z1 = normal(batch.seed, "drift", batch.position, 0, batch.latent_shape).to(batch.latents)
        prompts = Conditions(batch.text, batch.pooled)
        prompts = prompts.told(guidance_scale) if is_told else prompts
        cond, uncond = branches(velocity, prompts, Conditions(batch.empty_text, batch.empty_pooled))
        for part, (sigma_a, sigma_b) in zip(parts, spans, strict=True):
            found = drift(cond, uncond, batch.latents, z1, sigma_a, sigma_b, steps, cfg_scale)
            part.append(
                DriftResult(error=found.error[batch.valid].cpu(), on_ray=found.on_ray[batch.valid].cpu())
            )
    return [
        DriftResult(error=torch.cat([p.error for p in part]), on_ray=torch.cat([p.on_ray for p in part]))
        for part in parts
    ]


def span_facts(span: Sequence[float], result: DriftResult) -> dict[str, Any]:
    """The drift of one span as plain values for JSON, with each sample's: comparisons of models are paired."""
    return {
        "from": span[0],
        "to": span[1],
        "absolute": result.absolute,
        "standard_error": result.standard_error,
        "relative": result.relative,
        "errors": result.error.tolist(),
    }


def at_scale(
    velocity: ModelVelocity, prompts: Conditions, empty: Conditions, guidance_scale: float, is_told: bool
) -> Velocity:
    """The guided velocity at prompts: a guidance-distilled model is told the scale, another is asked twice."""
    if is_told:
        told = prompts.told(guidance_scale)
        return lambda latents, sigma: velocity(latents, sigma, told)
    return guided(*branches(velocity, prompts, empty), guidance_scale)


def branches(velocity: ModelVelocity, prompts: Conditions, empty: Conditions) -> tuple[Velocity, Velocity]:
    """The conditional and the unconditional velocity at prompts, as functions of latents and sigma.

    Args:
        prompts: [B]; empty: of the empty prompt, [1] or without that dimension.
    """
    empty = Conditions(empty.text.expand_as(prompts.text), empty.pooled.expand_as(prompts.pooled))

    def cond(latents: Tensor, sigma: Tensor) -> Tensor:
        return velocity(latents, sigma, prompts)

    def uncond(latents: Tensor, sigma: Tensor) -> Tensor:
        return velocity(latents, sigma, empty)

    return cond, uncond
