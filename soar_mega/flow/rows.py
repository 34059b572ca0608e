"""Every state and target of training as a row of coefficients over six sources.

Rows are float64 and cost nothing; a tensor of latent size is made by `combine` alone, when it is needed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from soar_mega.flow.rollout import Coefficients

SOURCES = ("z0", "z1", "v_uncond", "v_cond", "eps", "z1_aux")


def base_rows(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (state, target), each [P, 6] float64, of points on the ray: z = (1 - s) z0 + s z1, target z1 - z0.

    Args:
        sigma: [P].
    """
    sigma = sigma.double()
    zero = torch.zeros_like(sigma)
    state = torch.stack([1 - sigma, sigma, zero, zero, zero, zero], dim=-1)
    target = torch.stack([zero - 1, zero + 1, zero, zero, zero, zero], dim=-1)
    return state, target


def auxiliary_rows(
    sigma0: Tensor,
    sigma1: Tensor,
    sigma_aux: Tensor,
    guidance_scale: Tensor | float,
    coefficients: Coefficients,
    fresh_endpoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows (state, target), each [P, 6] float64, of SOAR's auxiliary points.

    From z = (1 - s0) z0 + s0 z1 a rollout with v = v_uncond + g (v_cond - v_uncond) ends at
    zhat = A z + B v + C eps. Noised again to s' = sigma_aux, with a = (s' - s1) / (1 - s1), it is
    z' = (1 - a) zhat + a z1. The target (z' - z0) / s' is the velocity that leads straight from z' to z0.

    Args:
        sigma0, sigma1, sigma_aux: [P], or broadcastable to the points, s1 <= s' <= 1 and s' > 0.
        guidance_scale: g, of all points or one of each.
        coefficients: (A, B, C) of `rollout_coefficients`.
        fresh_endpoint: noise again towards z1_aux, not towards the z1 of the first state.
    """
    sigma0, sigma1, sigma_aux = sigma0.double(), sigma1.double(), sigma_aux.double()
    a, b, c = coefficients
    keep = _kept_share(sigma1, sigma_aux)
    renoise = 1 - keep
    z0 = keep * a * (1 - sigma0)
    z1 = keep * a * sigma0
    zero = torch.zeros_like(renoise)
    z1, z1_aux = (z1, renoise) if fresh_endpoint else (z1 + renoise, zero)
    rest = [z1, keep * b * (1 - guidance_scale), keep * b * guidance_scale, keep * c, z1_aux]
    state = torch.stack(torch.broadcast_tensors(z0, *rest), dim=-1)
    target = torch.stack(torch.broadcast_tensors(z0 - 1, *rest), dim=-1) / sigma_aux[..., None]
    return state, target


def correction_strength(sigma0: Tensor, sigma1: Tensor, sigma_aux: Tensor) -> Tensor:
    """k of the ODE rollout, float64 [P]: target - (z1 - z0) = -k (v_guided - (z1 - z0))."""
    sigma0, sigma1, sigma_aux = sigma0.double(), sigma1.double(), sigma_aux.double()
    return _kept_share(sigma1, sigma_aux) * (sigma0 - sigma1) / sigma_aux


def combine(rows: Tensor, sources: Sequence[Tensor | None]) -> Tensor:
    """The states or targets that `rows` describe: [P, C, H, W], float32 (float64 where a source is float64).

    The error is a few float32 roundings of the largest term, at any sigma: small sigmas divide coefficients
    in float64, never a difference of latents.

    Args:
        rows: [P, 6] float64. Leading dimensions may be several, [B, N, 6].
        sources: in the order of SOURCES, each [P, C, H, W] (or broadcastable to it), None where the column is
            all zero.
    """
    for name, column, source in zip(SOURCES, rows.unbind(-1), sources, strict=True):
        assert source is not None or not bool(column.any()), (
            f"the rows read the source {name}, which is missing"
        )
    return weighted_sum(rows, sources)


def weighted_sum(rows: Tensor, sources: Sequence[Tensor | None]) -> Tensor:
    """`combine` without a look at the values of `rows`, which may be on the device as the sources are."""
    assert rows.shape[-1] == len(SOURCES) == len(sources), "one source per column"
    total: Tensor | None = None
    for column, source in zip(rows.unbind(-1), sources, strict=True):
        if source is None:
            continue
        dtype = torch.promote_types(source.dtype, torch.float32)
        latent_dims = source.ndim - column.ndim
        factor = column.reshape(column.shape + (1,) * latent_dims).to(source.device, dtype)
        total = factor * source if total is None else torch.addcmul(total, factor, source.to(dtype))
    assert total is not None, "at least one source"
    return total


def _kept_share(sigma1: Tensor, sigma_aux: Tensor) -> Tensor:
    """1 - a = (1 - s') / (1 - s1), the share of the rolled-out state that is left after noising again."""
    span = 1 - sigma1
    return torch.where(span > 0, (1 - sigma_aux) / span, 1.0)  # at s1 = 1 the state is noise already
