"""The loss of SOAR's training points: squared error of a velocity against a target that is never stored.

    target[p] = sum over j of rows[p, j] source_j[sample[p]]
    loss[p] = weight[p] mean((velocity[p] - target[p])^2)

One pass reads the velocity and, once for all points of a sample and path, the sources; it writes the gradient.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import architecture, check_tensor, define, launch, launches, once_per_layout
from soar_mega.kernels.point_tables import WEIGHT, PointTable, check_sources, combined, one_table
from soar_mega.kernels.tables import launch_of, width_class


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
    table, leading = one_table(
        sources, rows, weight=weight, sample=sample, path=path, draw=draw, seed=seed, position=position
    )
    check_tensor("velocity", velocity, shape=(*leading, *z0.shape[1:]), device=z0.device)
    return losses_of(velocity.flatten(0, len(leading) - 1), sources, table).unflatten(0, leading)


def losses_of(velocity: Tensor, sources: Sequence[Tensor | None], table: PointTable) -> Tensor:
    """`correction_loss` of velocities [P, C, H, W] and a table that is on the device already: [P] float32.

    The host waits for nothing.

    Args:
        sources: in the order of `soar_mega.flow.SOURCES`; v_uncond and v_cond [A, C, H, W] have the table's answers as
            rows.
    """
    z0 = sources[0]
    assert z0 is not None
    check_sources(z0, *sources[1:])
    _check_velocity(velocity, z0)
    if len(velocity) != len(table):
        raise ValueError(f"velocity must have a row for each of the {len(table)} points, not {len(velocity)}")
    if any(source is not None and source.requires_grad for source in sources):
        raise ValueError("the sources are constants of correction_loss: detach those that require a gradient")
    learn = velocity.requires_grad and torch.is_grad_enabled()
    (losses,) = _operation(velocity, sources, table, learn)
    return losses  # type: ignore[no-any-return]


@once_per_layout
def _check_velocity(velocity: Tensor, z0: Tensor) -> bool:
    check_tensor("velocity", velocity, shape=("P", *z0.shape[1:]), device=z0.device)
    return True


def _forward(
    velocity: Tensor, sources: Sequence[Tensor | None], table: PointTable, learn: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses and, to `learn`, their gradient."""
    read = table.read(sources)
    if launches(velocity.device):
        return _launched(velocity, read, table, learn)
    error = velocity.float() - combined(sources, table)
    weight = table.points[:, WEIGHT]
    losses = error.square().flatten(1).mean(dim=1) * weight
    slope = 2.0 * (weight / velocity[0].numel())
    return losses, (error * slope[:, None, None, None]).to(velocity.dtype) if learn else None


def _launched(
    velocity: Tensor, sources: list[Tensor | None], table: PointTable, learn: bool
) -> tuple[Tensor, Tensor | None]:
    from soar_mega.kernels.source.correction_loss import correction_loss_kernel

    size = velocity[0].numel()
    shape = launch_of("correction_loss", width_class(*sources, velocity), architecture(velocity.device))
    blocks = -(-size // shape.block)
    partial = torch.empty(len(table), blocks, device=velocity.device)
    gradient = torch.empty_like(velocity) if learn else None
    launch(
        correction_loss_kernel,
        (blocks, len(table.groups)),
        velocity.device,
        *sources, table.groups, table.points, velocity, gradient, partial, size,
        **table.draws(), BLOCK=shape.block, num_warps=shape.num_warps,
    )  # fmt: skip
    return partial.sum(dim=1), gradient


def _setup_context(ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor | None]) -> None:
    ctx.save_for_backward(results[1])


def _backward(ctx: Any, losses: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * losses[:, None, None, None]).to(gradient.dtype), None, None, None


_operation = define(
    "correction_loss", forward=_forward, setup_context=_setup_context, backward=_backward, outputs=1
)
