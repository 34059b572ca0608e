"""adaLN in one pass: a gated branch joins the residual stream, which is normalised and modulated for what comes next.

    hidden = residual + gate branch          modulated = norm(hidden) (1 + scale) + shift

norm is LayerNorm over the hidden size without weights. The backward pass is one kernel too; the gradients of shift,
scale and gate are sums over tokens: each program adds up its own, and a second, small launch adds those up in a fixed
order.
"""

from typing import Any

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import LARGEST_ROW, architecture, check_tensor, define, launch, power_of_two
from soar_mega.kernels.sums import sum_lines
from soar_mega.kernels.tables import Launch, launch_of

EPSILON = 1e-6


def adaln(
    residual: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """(hidden, modulated), both [S, B, H] in the type of `residual`; hidden is `residual` itself without a branch.

    Args:
        residual: [S, B, H] float32, bfloat16 or float16, contiguous.
        shift, scale: [B, H] of the same type and device; may be slices of a wider tensor.
        branch, gate: [S, B, H] and [B, H], both or neither.
        epsilon: added to the variance.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    check_tensor("residual", residual, shape=("S", "B", "H"))
    if (branch is None) != (gate is None):
        raise ValueError("branch and gate go together: give both or neither")
    tokens, samples, width = residual.shape
    if max(tokens, width) > LARGEST_ROW:
        raise ValueError(
            f"residual has {tokens} tokens of {width}; at most {LARGEST_ROW} of either can be indexed"
        )
    alike: dict[str, Any] = {"dtypes": (residual.dtype,), "device": residual.device}
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is not None:
            check_tensor(name, vector, shape=(samples, width), strided=True, **alike)
    if branch is not None:
        check_tensor("branch", branch, shape=(tokens, samples, width), **alike)
    hidden, modulated, _ = _forward(residual, branch, gate, shift, scale, epsilon)
    return (residual if branch is None else hidden), modulated


def plain_adaln(
    residual: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """`adaln` by plain torch calls, which autograd differentiates."""
    hidden = residual
    if branch is not None and gate is not None:
        hidden = torch.addcmul(residual, gate, branch)
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=epsilon)
    return hidden, torch.addcmul(shift, normed, 1 + scale)


def _triton_forward(
    residual: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    from soar_mega.kernels.source.adaln import forward_kernel

    tokens, samples, width = residual.shape
    size = _launch("forward", residual)
    hidden = None if branch is None else _empty(residual)
    modulated = _empty(residual)
    statistics = torch.empty(tokens, samples, 2, device=residual.device)
    launch(
        forward_kernel, (-(-tokens // size.block), samples), residual.device,
        residual, branch, gate, shift, scale, hidden, modulated, statistics,
        tokens, samples, _stride(gate), shift.stride(0), scale.stride(0), epsilon,
        H=width, WIDTH=power_of_two(width), ROWS=size.block, num_warps=size.num_warps,
    )  # fmt: skip
    return _or_nothing(hidden, residual), modulated, statistics


def _eager_forward(
    residual: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = residual if branch is None or gate is None else torch.addcmul(residual, gate, branch)
    normed, mean, inverse = torch.native_layer_norm(hidden, hidden.shape[-1:], None, None, epsilon)
    modulated = torch.addcmul(shift, normed, 1 + scale)
    statistics = torch.cat([mean, inverse], dim=-1).float()
    return _or_nothing(None if branch is None else hidden, residual), modulated, statistics


def _fake_forward(
    residual: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = None if branch is None else torch.empty_like(residual)
    statistics = residual.new_empty(*residual.shape[:2], 2, dtype=torch.float32)
    return _or_nothing(hidden, residual), torch.empty_like(residual), statistics


def _triton_backward(
    grad_hidden: Tensor | None,
    grad_modulated: Tensor,
    hidden: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    statistics: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from soar_mega.kernels.source.adaln import backward_kernel

    tokens, samples, width = hidden.shape
    size = _launch("backward", hidden)
    grad_residual = _empty(hidden)
    grad_branch = None if branch is None else _empty(hidden)
    blocks = -(-tokens // size.block)
    partials = torch.empty(blocks, 2 if branch is None else 3, samples, width, device=hidden.device)
    launch(
        backward_kernel, (blocks, samples), hidden.device,
        grad_hidden, grad_modulated, hidden, branch, gate, scale, statistics,
        grad_residual, grad_branch, partials,
        tokens, samples, _stride(gate), scale.stride(0),
        H=width, WIDTH=power_of_two(width), ROWS=size.block, num_warps=size.num_warps,
    )  # fmt: skip
    return grad_residual, _or_nothing(grad_branch, hidden), sum_lines(partials, hidden.dtype)


def _eager_backward(
    grad_hidden: Tensor | None,
    grad_modulated: Tensor,
    hidden: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    statistics: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = hidden.shape[-1:]
    normed, mean, inverse = torch.native_layer_norm(hidden, shape, None, None, epsilon)
    gradient, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_modulated * (1 + scale), hidden, shape, mean, inverse, None, None, [True, False, False]
    )
    if grad_hidden is not None:
        gradient = gradient + grad_hidden
    vectors = [grad_modulated.sum(0), (grad_modulated * normed).sum(0)]
    if branch is None or gate is None:
        return gradient, _or_nothing(None, hidden), torch.stack(vectors)
    return gradient, gradient * gate, torch.stack([*vectors, (gradient * branch).sum(0)])


def _fake_backward(
    grad_hidden: Tensor | None,
    grad_modulated: Tensor,
    hidden: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    statistics: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = hidden.new_empty(2 if branch is None else 3, *scale.shape)
    grad_branch = None if branch is None else torch.empty_like(hidden)
    return torch.empty_like(hidden), _or_nothing(grad_branch, hidden), vectors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    residual, branch, gate, _, scale, epsilon = inputs
    hidden, _, statistics = output
    ctx.save_for_backward(residual if branch is None else hidden, branch, gate, scale, statistics)
    ctx.epsilon = epsilon
    ctx.set_materialize_grads(False)  # nothing may read hidden but the norm


def _autograd(
    ctx: Any, grad_hidden: Tensor | None, grad_modulated: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    hidden, branch, gate, scale, statistics = ctx.saved_tensors
    if branch is None:
        grad_hidden = None  # of the empty stand-in
    grad_hidden = None if grad_hidden is None else grad_hidden.contiguous()
    grad_modulated = torch.zeros_like(hidden) if grad_modulated is None else grad_modulated.contiguous()
    grad_residual, grad_branch, vectors = _backward(
        grad_hidden, grad_modulated, hidden, branch, gate, scale, statistics, ctx.epsilon
    )
    if branch is None:
        return grad_residual, None, None, vectors[0], vectors[1], None
    return grad_residual, grad_branch, vectors[2], vectors[0], vectors[1], None


def _launch(direction: str, tensor: Tensor) -> Launch:
    """The table's entry; a thread works on as many bytes of float32 as of a type of two bytes."""
    width = 2048 if tensor.shape[-1] <= 2048 else 4096
    entry = launch_of("adaln", f"{direction} {width}", architecture(tensor.device))
    return Launch(entry.block, min(32, entry.num_warps * tensor.element_size() // 2))


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operation of torch.library returns the same number of tensors always: an empty one for none."""
    return like.new_empty(0) if tensor is None else tensor


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


_backward = define("adaln_backward", triton=_triton_backward, eager=_eager_backward, fake=_fake_backward)
_forward = define(
    "adaln",
    triton=_triton_forward,
    eager=_eager_forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
