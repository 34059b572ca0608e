"""Sampling with stochastic steps, and the log-probability that reinforcement learning needs of each of them.

A stochastic step from x to x' = A x + B v + C eps is a Gaussian with mean A x + B v and standard deviation C. Its
log-probability is published as the mean over the dimensions of a latent, not as their sum: ratios of it stay near 1
for images of any size.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from soar_mega.flow.rollout import Coefficients, mixed_coefficients
from soar_mega.flow.samplers import Velocity

STOCHASTIC_VARIANTS = ("flow_sde", "cps", "dance")

Noise = Callable[[int, Tensor], Tensor]  # (step, samples [K] int64 on the CPU) -> standard normal [K, ...]


class SampledStep(NamedTuple):
    """One step of B samples.

    Attributes:
        state, following: [B, ...] before and after it.
        log_probability: [B] float32 under the velocity that led there; NaN where the step is deterministic.
    """

    step: int
    state: Tensor
    following: Tensor
    log_probability: Tensor


def sample_steps(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    variant: str,
    eta: float,
    stochastic: Tensor,
    noise: Noise,
    told: Tensor | None = None,
) -> Iterator[SampledStep]:
    """The steps from sigmas[0] to sigmas[-1], some of them stochastic, the others Euler's.

    Args:
        latents: [B, ...] float32, the states at sigmas[0].
        sigmas: [n + 1] float64, n at least 2: where the first is 1, the second stands in for it where a step divides by
            1 - sigma, as by default in `rollout_coefficients`.
        variant, eta: of the stochastic steps.
        stochastic: [B, n] bool, which steps of which sample are stochastic; on the CPU.
        noise: asked for the stochastic steps alone.
        told: as in `soar_mega.flow.sample`.
    """
    given = (sigmas if told is None else told).tolist()
    for index in range(len(sigmas) - 1):
        sigma = torch.full((len(latents),), given[index], dtype=torch.float64, device=latents.device)
        v = velocity(latents, sigma).to(latents.dtype)
        coefficients = mixed_coefficients(
            variant, sigmas[index], sigmas[index + 1], eta, stochastic[:, index]
        )
        drawn = coefficients[2].nonzero().flatten()
        eps = noise(index, drawn) if len(drawn) else None
        following, log_probability = stochastic_step(variant, coefficients, latents, v, eps)
        yield SampledStep(index, latents, following, log_probability)
        latents = following


def stochastic_step(
    variant: str, coefficients: Coefficients, latents: Tensor, velocity: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(following [B, ...], log-probability [B], NaN where C is 0) of a step of B samples.

    Args:
        noise: standard normal [K, ...] of the K samples whose C is not 0, in their order; None where K is 0.
    """
    following = mean = step_mean(coefficients, latents, velocity)
    drawn = coefficients[2].nonzero().flatten()
    if noise is not None:
        scale = spread(coefficients[2][drawn], latents)
        drawn = drawn.to(latents.device)
        following = mean.index_copy(0, drawn, mean.index_select(0, drawn) + scale * noise.to(latents))
    return following, step_log_probability(variant, coefficients[2], following, mean)


def step_mean(coefficients: Coefficients, latents: Tensor, velocity: Tensor) -> Tensor:
    """A x + B v, [B, ...] in the latents' dtype."""
    a, b, _ = coefficients
    return spread(a, latents) * latents + spread(b, latents) * velocity


def step_log_probability(variant: str, std: Tensor, following: Tensor, mean: Tensor) -> Tensor:
    """Log-probability [B] of steps that ended in `following`; NaN where `std` [B], the C of the step, is 0.

    Of flow_sde and dance the mean over dimensions of the Gaussian's log density; of cps as its authors have it, without
    the division and the constant: -mean (x' - mean)^2.
    """
    squared = (following - mean).square().flatten(1).mean(dim=1)
    if variant == "cps":
        return torch.where(std.to(squared.device) > 0, -squared, torch.nan)
    constant = std.log() + math.log(2 * math.pi) / 2
    per_square = -1 / (2 * std.square())  # in float64, where std is
    return per_square.to(squared) * squared - constant.to(squared)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """[B] values as factors of `like` [B, ...], of its dtype and where it is."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
