"""SOAR's auxiliary states in one call: roll out, then noise again towards an endpoint."""

import torch
from torch import Tensor

from soar_mega.flow.rollout import rollout_coefficients
from soar_mega.flow.rows import auxiliary_rows, combine


def auxiliary_latents(
    z0: Tensor,
    z1: Tensor,
    sigma0: Tensor,
    sigma1: Tensor,
    v_uncond: Tensor | None,
    v_cond: Tensor,
    cfg_scale: float,
    sigma_aux: Tensor,
    variant: str = "ode",
    eta: float = 0.0,
    eps: Tensor | None = None,
    z1_aux: Tensor | None = None,
) -> Tensor:
    """The auxiliary states z' at sigma_aux: [B, N, C, H, W] float32 (formula: `auxiliary_rows`).

    Args:
        z0, z1: [B, C, H, W] clean latents and noise endpoints.
        sigma0, sigma1: [B] start and end of the rollout.
        v_uncond, v_cond: [B, C, H, W] velocities at (1 - sigma0) z0 + sigma0 z1; v_uncond may be None at
            cfg_scale 1.
        sigma_aux: [B, N] in [sigma1, 1].
        variant, eta: see `rollout_coefficients`.
        eps: [B, C, H, W] or [B, N, C, H, W] noise of a stochastic variant.
        z1_aux: the same shapes; endpoints to noise towards in place of z1.

    Raises:
        ValueError: a tensor of another shape, a missing source, or sigmas out of range; the message names the
            argument.
    """
    batch = _shape("z0", z0, ("B", "C", "H", "W"))
    for name, tensor in (("z1", z1), ("v_cond", v_cond), ("v_uncond", v_uncond)):
        if tensor is not None and tensor.shape != z0.shape:
            raise ValueError(f"{name} must have the shape of z0 {tuple(z0.shape)}, not {tuple(tensor.shape)}")
    for name, tensor in (("sigma0", sigma0), ("sigma1", sigma1)):
        if tensor.shape != (batch,):
            raise ValueError(
                f"{name} must have one value per sample, shape {(batch,)}, not {tuple(tensor.shape)}"
            )
    if _shape("sigma_aux", sigma_aux, ("B", "N")) != batch:
        raise ValueError(f"sigma_aux must have one row per sample of z0 ({batch}), not {len(sigma_aux)}")
    if not bool(((sigma_aux >= sigma1[:, None] - 1e-6) & (sigma_aux <= 1) & (sigma_aux > 0)).all()):
        raise ValueError(
            "sigma_aux must lie in [sigma1, 1] and be positive: auxiliary states are noisier than the rollout"
        )
    if v_uncond is None and cfg_scale != 1:
        raise ValueError(f"v_uncond is needed at cfg_scale {cfg_scale}; only cfg_scale 1 goes without it")

    coefficients = rollout_coefficients(variant, sigma0, sigma1, eta)
    if eps is None and bool(coefficients[2].any()):
        raise ValueError(f"eps is needed: the rollout variant {variant!r} adds noise")
    a, b, c = (x[:, None] for x in coefficients)
    state, _ = auxiliary_rows(
        sigma0[:, None], sigma1[:, None], sigma_aux, cfg_scale, (a, b, c), fresh_endpoint=z1_aux is not None
    )
    shared = [x if x is None else x[:, None] for x in (z0, z1, v_uncond, v_cond)]
    per_path = [_per_point(name, x, z0, sigma_aux) for name, x in (("eps", eps), ("z1_aux", z1_aux))]
    return combine(state, [*shared, *per_path])


def _shape(name: str, tensor: Tensor, dims: tuple[str, ...]) -> int:
    """Checks the number of dimensions and returns the first size."""
    if tensor.ndim != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}], not of shape {tuple(tensor.shape)}")
    return tensor.shape[0]


def _per_point(name: str, tensor: Tensor | None, z0: Tensor, sigma_aux: Tensor) -> Tensor | None:
    """A source that is shared by a sample's points, or has one tensor per point, as [B, 1 or N, C, H, W]."""
    if tensor is None:
        return None
    per_point = sigma_aux.shape + z0.shape[1:]
    if tensor.shape not in (z0.shape, torch.Size(per_point)):
        raise ValueError(
            f"{name} must have shape {tuple(z0.shape)} or {tuple(per_point)}, not {tuple(tensor.shape)}"
        )
    return tensor[:, None] if tensor.ndim == z0.ndim else tensor
