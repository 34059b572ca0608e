"""The loss of SOAR's training points: squared error of a velocity against a target that is never stored.

    target[p] = sum over j of rows[p, j] source_j[sample[p]]
    loss[p] = weight[p] mean((velocity[p] - target[p])^2)

One pass reads the velocity and, once for all points of a sample and path, the sources; it writes the gradient.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import architecture, check_tensor, define, launch, launches
from soar_mega.kernels.sources import check_points, check_values, combined, tables, width_class
from soar_mega.kernels.tables import launch_of


def correction_loss(
    velocity: Tensor,
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    rows: Tensor,
    *,
    weight: Tensor | None = None,
    eps: Tensor | None = None,
    z1_aux: Tensor | None = None,
    sample: Tensor | None = None,
    path: Tensor | None = None,
    draw: Collection[str] = (),
    seed: int = 0,
    position: Tensor | None = None,
) -> Tensor:
    """Losses of P points, [P] float32 or, for rows [B, N, 6], [B, N]. Differentiable in the velocity, once.

    What a log says of each sigma quartile are sums of these numbers. The sums inside have a fixed order: equal inputs
    give equal bits.

    Args:
        velocity: [P, C, H, W] or [B, N, C, H, W], as the rows are; the gradient has its dtype.
        rows: of the targets.
        weight: float64 factors on the losses, [P] or [B, N], on the CPU; None: one.
        z0, z1, v_uncond, v_cond, eps, z1_aux, sample, path, draw, seed, position: see `rollout_renoise`. They are
            constants here: no gradient reaches them.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, not contiguous or empty, a source that the rows
            read and nobody gives, or one that asks for a gradient; the message names it.
    """
    sources = (z0, z1, v_uncond, v_cond, eps, z1_aux)
    point = check_points(sources, rows, sample, path, draw, position)
    check_tensor("velocity", velocity, shape=(*point.leading, *z0.shape[1:]), device=z0.device)
    if weight is not None:
        check_tensor("weight", weight, shape=point.leading, dtypes=(torch.float64,), device=rows.device)
        weight = weight.flatten()
    if any(source is not None and source.requires_grad for source in sources):
        raise ValueError("the sources are constants of correction_loss: detach those that require a gradient")
    learn = velocity.requires_grad and torch.is_grad_enabled()
    losses, _ = _operation(
        velocity.flatten(0, len(point.leading) - 1), *sources, point.rows, weight,
        point.sample, point.path, point.position, seed, point.drawn, learn,
    )  # fmt: skip
    return losses.unflatten(0, point.leading)


def _triton(
    velocity: Tensor,
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    eps: Tensor | None,
    z1_aux: Tensor | None,
    rows: Tensor,
    weight: Tensor | None,
    sample: Tensor,
    path: Tensor,
    position: Tensor | None,
    seed: int,
    drawn: Sequence[bool],
    learn: bool,
) -> tuple[Tensor, Tensor]:
    from soar_mega.kernels.source.correction_loss import loss_kernel

    given = (z0, z1, v_uncond, v_cond, eps, z1_aux)
    used = check_values(given, rows, sample, drawn)
    sources = [source if read else None for source, read in zip(given, used, strict=True)]
    draws = [made and read for made, read in zip(drawn, used, strict=True)]
    size = z0[0].numel()
    weight = torch.ones(len(rows), dtype=torch.float64) if weight is None else weight
    groups, points = tables(rows, sample, path, position, seed, weight / size, z0.device)
    shape = launch_of("correction_loss", width_class(*sources, velocity), architecture(z0.device))
    blocks = -(-size // shape.block)
    partial = torch.empty(len(rows), blocks, device=z0.device)
    gradient = torch.empty(velocity.shape if learn else 0, dtype=velocity.dtype, device=z0.device)
    launch(
        loss_kernel,
        (blocks, len(groups)),
        z0.device,
        *sources, groups, points, velocity, gradient if learn else None, partial, size,
        DRAW_Z1=draws[1], DRAW_EPS=draws[4], DRAW_Z1_AUX=draws[5], BLOCK=shape.block, num_warps=shape.num_warps,
    )  # fmt: skip
    return partial.sum(dim=1), gradient


def _eager(
    velocity: Tensor,
    z0: Tensor,
    z1: Tensor | None,
    v_uncond: Tensor | None,
    v_cond: Tensor | None,
    eps: Tensor | None,
    z1_aux: Tensor | None,
    rows: Tensor,
    weight: Tensor | None,
    sample: Tensor,
    path: Tensor,
    position: Tensor | None,
    seed: int,
    drawn: Sequence[bool],
    learn: bool,
) -> tuple[Tensor, Tensor]:
    sources = (z0, z1, v_uncond, v_cond, eps, z1_aux)
    error = velocity.float() - combined(sources, rows, sample, path, position, seed, drawn)
    losses = error.square().flatten(1).mean(dim=1)
    scale = torch.full_like(losses, 1.0 / z0[0].numel())
    if weight is not None:
        losses = losses * weight.to(losses)
        scale = scale * weight.to(losses)
    if not learn:
        return losses, velocity.new_empty(0)
    return losses, (error * (2.0 * scale)[:, None, None, None]).to(velocity.dtype)


def _forward(velocity: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return (_triton if launches(velocity.device) else _eager)(velocity, *arguments)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]
) -> None:  # type: ignore[type-arg]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, losses: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
    rest = (None,) * 14
    if losses is None:
        return None, *rest
    return (gradient * losses[:, None, None, None]).to(gradient.dtype), *rest


_operation = define(
    "correction_loss",
    forward=_forward,
    setup_context=_setup_context,
    backward=_backward,
)
