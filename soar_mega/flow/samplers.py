"""Euler and Heun samplers over any velocity function, and classifier-free guidance as such a function."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

SOLVERS = ("euler", "heun")

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], sigma [B] float64) -> velocity [B, ...]


def sample(velocity: Velocity, latents: Tensor, sigmas: Tensor, solver: str = "euler") -> Tensor:
    """Integrates dz/dsigma = velocity(z, sigma) from sigmas[0] to sigmas[-1].

    Args:
        latents: [B, ...] the state at sigmas[0]; the steps keep its dtype, so pass float32.
        sigmas: [n + 1], for instance of `Schedule.inference_sigmas`.
        solver: euler (order 1, one velocity per step) or heun (order 2, two per step; the step to sigma 0
            stays an Euler step, as models are not trained at sigma 0).

    Raises:
        ValueError: an unknown solver; fewer than two sigmas.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be one row of at least two values, not of shape {tuple(sigmas.shape)}")

    def slope(z: Tensor, sigma: float) -> Tensor:
        return velocity(z, torch.full((len(z),), sigma, dtype=torch.float64, device=z.device)).to(z.dtype)

    for start, end in pairwise(sigmas.tolist()):
        v = slope(latents, start)
        if solver == "heun" and end > 0:
            v = (v + slope(latents + (end - start) * v, end)) / 2
        latents = latents + (end - start) * v
    return latents


def guided(velocity_cond: Velocity, velocity_uncond: Velocity | None, guidance_scale: float) -> Velocity:
    """Classifier-free guidance, v_uncond + g (v_cond - v_uncond); at g = 1 this is velocity_cond itself.

    Raises:
        ValueError: no velocity_uncond although the guidance scale is not 1.
    """
    if guidance_scale == 1:
        return velocity_cond
    if velocity_uncond is None:
        raise ValueError(
            f"velocity_uncond is needed at guidance scale {guidance_scale}; only scale 1 goes without it"
        )
    uncond = velocity_uncond

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        # In the latents' dtype: guidance amplifies the rounding of a bf16 difference.
        v_uncond = uncond(latents, sigma).to(latents.dtype)
        return v_uncond + guidance_scale * (velocity_cond(latents, sigma).to(latents.dtype) - v_uncond)

    return velocity
