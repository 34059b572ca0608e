"""One rollout step from sigma0 down to sigma1, as three numbers: zhat = A z + B v + C eps."""

import math

import torch
from torch import Tensor

ROLLOUT_VARIANTS = ("ode", "simple", "sde", "flow_sde", "dance", "cps")

Coefficients = tuple[Tensor, Tensor, Tensor]


def rollout_coefficients(
    variant: str,
    sigma0: Tensor | float,
    sigma1: Tensor | float,
    eta: float,
    sigma_max: float | None = None,
) -> Coefficients:
    """Coefficients (A, B, C), float64 [B] or 0-d, of zhat = A z + B v + C eps for a step down to sigma1.

    With dt = sigma1 - sigma0, x0 = z - sigma0 v and x1 = z + (1 - sigma0) v:
        ode: z + dt v, the Euler step
        simple: z + dt v + eta sqrt(-dt) eps
        sde: (1 - sigma1) x0 + sigma1 eps, the predicted clean latent noised afresh
        flow_sde: z + dt (v + std^2 (z + (1 - sigma0) v) / (2 sigma0)) + std sqrt(-dt) eps with
            std = eta sqrt(sigma0 / (1 - sigma0)), the reverse SDE of Flow-GRPO (Liu et al. 2025)
        dance: the same with std = eta, as in DanceGRPO (Xue et al. 2025)
        cps: (1 - sigma1) x0 + sqrt(sigma1^2 - std^2) x1 + std eps with std = sigma1 sin(eta pi / 2),
            coefficients-preserving sampling (Wang and Yu 2025)
    A step of length zero (sigma1 = sigma0) leaves z where it is in every variant.

    Args:
        eta: strength of the noise; ode and sde do not read it.
        sigma_max: stands in for a sigma0 of 1 where flow_sde divides by 1 - sigma0. Default: sigma1.

    Raises:
        ValueError: an unknown variant; sigmas that break 0 <= sigma1 <= sigma0 <= 1; eta below 0, or above 1
            for cps; sigma_max outside (0, 1).
    """
    s0, s1 = torch.broadcast_tensors(
        torch.as_tensor(sigma0, dtype=torch.float64), torch.as_tensor(sigma1, dtype=torch.float64)
    )
    _check(variant, s0, s1, eta, sigma_max)
    dt = s1 - s0
    zero = torch.zeros_like(dt)
    if variant == "ode":
        a, b, c = zero + 1, dt, zero
    elif variant == "simple":
        a, b, c = zero + 1, dt, eta * (-dt).sqrt()
    elif variant == "sde":
        a, b, c = 1 - s1, -(1 - s1) * s0, s1
    elif variant in ("flow_sde", "dance"):
        variance = eta**2 * (_odds(s0, s1, sigma_max) if variant == "flow_sde" else zero + 1)
        drift = variance / (2 * s0)
        a, b, c = 1 + drift * dt, (1 + drift * (1 - s0)) * dt, (variance * -dt).sqrt()
    else:
        keep, std = s1 * math.cos(eta * math.pi / 2), s1 * math.sin(eta * math.pi / 2)
        a, b, c = 1 - s1 + keep, (1 - s0) * keep - (1 - s1) * s0, std
    moves = s1 < s0
    return torch.where(moves, a, 1.0), torch.where(moves, b, 0.0), torch.where(moves, c, 0.0)


def mixed_coefficients(
    variant: str, sigma0: Tensor, sigma1: Tensor, eta: float, stochastic: Tensor
) -> Coefficients:
    """(A, B, C), each [B] float64, of steps by `variant` where `stochastic` [B], and elsewhere of Euler's: C is 0."""
    noisy = rollout_coefficients(variant, sigma0, sigma1, eta)
    plain = rollout_coefficients("ode", sigma0, sigma1, 0.0)
    a, b, c = (torch.where(stochastic, x, y) for x, y in zip(noisy, plain, strict=True))
    return a, b, c


def _odds(sigma0: Tensor, sigma1: Tensor, sigma_max: float | None) -> Tensor:
    """sigma0 / (1 - sigma0), finite at a sigma0 of 1 too."""
    top = sigma1 if sigma_max is None else torch.full_like(sigma0, sigma_max)
    return sigma0 / (1 - torch.where(sigma0 == 1, top, sigma0))


def _check(variant: str, sigma0: Tensor, sigma1: Tensor, eta: float, sigma_max: float | None) -> None:
    if variant not in ROLLOUT_VARIANTS:
        raise ValueError(f"unknown rollout variant {variant!r}; choose one of {', '.join(ROLLOUT_VARIANTS)}")
    if not bool(((sigma1 >= 0) & (sigma1 <= sigma0) & (sigma0 <= 1)).all()):
        raise ValueError(
            "a rollout goes from noise to data: 0 <= sigma1 <= sigma0 <= 1 must hold for every sample"
        )
    if not 0 <= eta < math.inf or (variant == "cps" and eta > 1):
        raise ValueError(f"eta must be at least 0, and at most 1 for the variant cps, not {eta}")
    if sigma_max is not None and not 0 < sigma_max < 1:
        raise ValueError(f"sigma_max stands in for a sigma of 1 and must lie inside (0, 1), not {sigma_max}")
