"""Where in time to train: densities over the unshifted time u, as maps of a uniform number."""

import math

import torch
from torch import Tensor

DENSITIES = ("logit_normal", "uniform", "mode", "beta")


def sample_time(
    density: str, uniform: Tensor, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> Tensor:
    """Unshifted times u (1 is noise) from uniform numbers in (0, 1): same shape, float64.

    The densities of Esser et al. 2024 (SD3), sections 3.1 and 5.1, by the formulas of diffusers'
    compute_density_for_timestep_sampling:
        logit_normal: u = sigmoid(logit_mean + logit_std n), n normal; a positive mean moves towards noise
        uniform: u itself
        mode: 1 - x - mode_scale (cos^2(pi x / 2) - 1 + x), x uniform
    and that of MixFlow (arXiv 2512.19311), under which it meets all pairs of a time and a noisier one equally often:
        beta: 1 - sqrt(1 - x): the distance from noise, 1 - u, is Beta(2, 1)

    Raises:
        ValueError: an unknown density, logit_std not positive, mode_scale outside [-1, 2 / (pi - 2)].
    """
    x = uniform.double()
    if density == "logit_normal":
        if not logit_std > 0:
            raise ValueError(f"logit_std must be positive (the paper uses 1), not {logit_std}")
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(x))
    if density == "uniform":
        return x
    if density == "mode":
        if not -1 <= mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"mode_scale must lie in [-1, 2 / (pi - 2) = 1.75] for u to stay in [0, 1], not {mode_scale}"
            )
        return 1 - x - mode_scale * (torch.cos(math.pi * x / 2) ** 2 - 1 + x)
    if density == "beta":
        return 1 - (1 - x).sqrt()
    raise ValueError(f"unknown timestep density {density!r}; choose one of {', '.join(DENSITIES)}")


def slowed(sigma: Tensor, gamma: float, uniform: Tensor) -> Tensor:
    """Where MixFlow takes the state that it tells sigma of: sigma + gamma U (1 - sigma), same shape, float64.

    A sampler's states are noisier than their sigma says, so the model learns from noisier ones.

    Args:
        uniform: numbers U in (0, 1), same shape.
    """
    return sigma + gamma * uniform * (1 - sigma)
