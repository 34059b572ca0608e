"""How much a training point's loss weighs, by its sigma."""

import math

import torch
from torch import Tensor

WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


def loss_weight(scheme: str, sigma: Tensor) -> Tensor:
    """Loss weights at sigma [...] float64: likewise.

    none: 1; sigma_sqrt: sigma^-2; cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)); the schemes of diffusers'
    compute_loss_weighting_for_sd3.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    raise ValueError(f"unknown loss weighting {scheme!r}; choose one of {', '.join(WEIGHTINGS)}")
