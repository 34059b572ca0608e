"""Samplers over any velocity function, and classifier-free guidance as such a function."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from soar_mega.flow.schedule import Schedule, check_sampling_steps

MULTISTEP = "dpm++2m"
SOLVERS = ("euler", "heun", MULTISTEP)

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], sigma [B] float64) -> velocity [B, ...]


def sample(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    solver: str = "euler",
    told: Tensor | None = None,
) -> Tensor:
    """Integrates dz/dsigma = velocity(z, sigma) from sigmas[0] to sigmas[-1].

    Args:
        latents: [B, ...] the state at sigmas[0]; the steps keep its dtype, so pass float32.
        sigmas: [n + 1], for instance of `Schedule.inference_sigmas`.
        solver: euler (order 1, one velocity per step), heun (order 2, two per step; the step to sigma 0
            stays an Euler step, as models are not trained at sigma 0), or dpm++2m (order 2, one per step).
        told: [n] what the velocity is told at the first n sigmas, where that is not the sigma itself.

    Raises:
        ValueError: an unknown solver; fewer than two sigmas.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be one row of at least two values, not of shape {tuple(sigmas.shape)}")

    told_at = dict(zip(sigmas.tolist(), (sigmas if told is None else told).tolist(), strict=False))

    def slope(z: Tensor, sigma: float) -> Tensor:
        given = torch.full((len(z),), told_at[sigma], dtype=torch.float64, device=z.device)
        return velocity(z, given).to(z.dtype)

    if solver == MULTISTEP:
        return _multistep(slope, latents, sigmas.tolist())
    for start, end in pairwise(sigmas.tolist()):
        v = slope(latents, start)
        if solver == "heun" and end > 0:
            v = (v + slope(latents + (end - start) * v, end)) / 2
        latents = latents + (end - start) * v
    return latents


def solver_steps(schedule: Schedule, n: int, solver: str) -> tuple[Tensor, Tensor | None]:
    """Where an n-step sampler goes, as diffusers' pipelines do with the solver's scheduler.

    Euler and Heun take `Schedule.inference_sigmas`. DPMSolverMultistepScheduler, with use_flow_sigmas, starts a
    thousandth below sigma 1, takes equal steps of unshifted time, and tells the model whole timesteps, cut off.

    Returns:
        Sigmas [n + 1] float64 down to 0, and what the model is told at the first n of them; None: the sigmas.

    Raises:
        ValueError: n below 1.
    """
    if solver != MULTISTEP:
        return schedule.inference_sigmas(n), None
    check_sampling_steps(n)
    count, shift = schedule.num_train_timesteps, schedule.shift
    # in its order of operations: another rounding would cut off to another timestep
    alphas = 1.0 + torch.arange(n + 1, dtype=torch.float64) * ((1.0 / count - 1.0) / n)
    alphas[-1] = 1.0 / count
    unshifted = 1.0 - alphas
    sigmas = (shift * unshifted / (1.0 + (shift - 1.0) * unshifted)).flip(0)
    return sigmas, (sigmas[:-1] * count).trunc() / count


def _multistep(slope: Callable[[Tensor, float], Tensor], latents: Tensor, sigmas: list[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022) with alpha = 1 - sigma, as in diffusers' DPMSolverMultistepScheduler.

    It takes the clean latents x = z - sigma v for a linear function of lambda = log(alpha/sigma). The first step has
    no earlier x, and in the last one, to sigma 0, lambda has no end: these are Euler's.
    """
    earlier: Tensor | None = None
    for step, (start, end) in enumerate(pairwise(sigmas)):
        clean = latents - start * slope(latents, start)
        shown = clean
        if earlier is not None and end > 0:
            before = sigmas[step - 1]
            # half of the length of this step over that of the one before, which from sigma 1 is endless
            ratio = (
                0.0
                if before == 1
                else (_lambda(end) - _lambda(start)) / (_lambda(start) - _lambda(before)) / 2
            )
            shown = clean + ratio * (clean - earlier)
        kept = end / start
        latents = kept * latents + ((1 - end) - (1 - start) * kept) * shown
        earlier = clean
    return latents


def _lambda(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


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
