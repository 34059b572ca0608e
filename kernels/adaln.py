"""adaLN in one pass: a gated branch joins the residual stream, which is normalised and modulated for what comes next.

    hidden = residual + gate (branch + bias)          modulated = norm(hidden) (1 + scale) + shift

norm is LayerNorm over the hidden size without weights. The backward pass is one kernel too; the gradients of shift,
scale, gate and bias are sums over tokens: each program adds up its own, and a second, small launch adds those up in a
fixed order. On the CPU the same is done by plain torch calls.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import (
    LARGEST_ROW,
    architecture,
    check_tensor,
    define,
    empty,
    launch,
    launches,
    once_per_layout,
    power_of_two,
)
from soar_mega.kernels.gated_add import plain_gated_add
from soar_mega.kernels.sums import sum_lines
from soar_mega.kernels.tables import launch_of

EPSILON = 1e-6
PROGRAMS = 264  # of the backward pass, at most: two for each multiprocessor of an H100


@dataclass(frozen=True)
class Sizes:
    """Of the launches for one layout of the arguments: each direction's programs for a sample, and what is known at
    compile time."""

    forward_programs: int
    forward: dict[str, int]
    backward_programs: int
    backward: dict[str, int]


def adaln(
    residual: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = EPSILON,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(hidden, modulated), both [S, B, H] in the type of `residual`; hidden is `residual` itself without a branch.

    Who reads hidden and not `residual` from then on has both gradients added up in the backward pass of this.

    Args:
        residual: [S, B, H] float32, bfloat16 or float16, contiguous.
        shift, scale: [B, H] of the same type and device; may be slices of a wider tensor.
        branch, gate: [S, B, H] and [B, H], both or neither.
        bias: [H], which the linear behind the branch has left; only with a branch.
        epsilon: added to the variance.
        out: like `residual`; modulated is written there, and nothing gets a gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    sizes = _checked(residual, shift, scale, branch, gate, bias, out)
    if not launches(residual.device):
        return plain_adaln(residual, shift, scale, branch, gate, bias, epsilon, out)
    if out is not None:
        return _forward(residual, branch, bias, gate, shift, scale, epsilon, sizes, out)[:2]
    return _operation(residual, branch, bias, gate, shift, scale, epsilon, sizes)


def plain_adaln(
    residual: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = EPSILON,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`adaln` by plain torch calls, which autograd differentiates."""
    hidden = residual
    if branch is not None and gate is not None:
        hidden = plain_gated_add(residual, branch, gate, bias)
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=epsilon)
    return hidden, torch.addcmul(shift, normed, 1 + scale, out=out)


@once_per_layout
def _checked(
    residual: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> Sizes:
    check_tensor("residual", residual, shape=("S", "B", "H"))
    if (branch is None) != (gate is None):
        raise ValueError("branch and gate go together: give both or neither")
    if bias is not None and branch is None:
        raise ValueError("bias is of a branch: give branch and gate too")
    tokens, samples, width = residual.shape
    if max(tokens, width) > LARGEST_ROW:
        raise ValueError(
            f"residual has {tokens} tokens of {width}; at most {LARGEST_ROW} of either can be indexed"
        )
    alike: dict[str, Any] = {"dtypes": (residual.dtype,), "device": residual.device}
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is not None:
            check_tensor(name, vector, shape=(samples, width), strided=True, **alike)
    for name, tensor in (("branch", branch), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(tokens, samples, width), **alike)
    if bias is not None:
        check_tensor("bias", bias, shape=(width,), **alike)
    forward, rows = _launch("forward", residual)
    backward, least = _launch("backward", residual)
    return Sizes(
        forward_programs=-(-tokens // rows),
        forward=forward | {"ROWS": rows},
        backward_programs=min(max(1, PROGRAMS // samples), -(-tokens // least)),
        backward=backward,
    )


def _launch(direction: str, tensor: Tensor) -> tuple[dict[str, int], int]:
    """By the table's entry, and its block; a thread works on as many bytes of float32 as of a type of two bytes."""
    width = tensor.shape[-1]
    shape_class = f"{direction} {2048 if width <= 2048 else 4096}"
    entry = launch_of("adaln", shape_class, architecture(tensor.device))
    warps = min(32, entry.num_warps * tensor.element_size() // 2)
    return {"H": width, "WIDTH": power_of_two(width), "num_warps": warps}, entry.block


def _forward(
    residual: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    epsilon: float,
    sizes: Sizes,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from soar_mega.kernels.source.adaln import adaln_forward_kernel

    tokens, samples, _ = residual.shape
    hidden = residual if branch is None else empty(residual)
    modulated = empty(residual) if out is None else out
    statistics = torch.empty(tokens, samples, 2, device=residual.device)
    launch(
        adaln_forward_kernel, (sizes.forward_programs, samples), residual.device,
        residual, branch, bias, gate, shift, scale, None if branch is None else hidden, modulated, statistics,
        tokens, samples, _stride(gate), shift.stride(0), scale.stride(0), epsilon, **sizes.forward,
    )  # fmt: skip
    return hidden, modulated, statistics


def _setup_context(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor, Tensor]) -> None:
    _, branch, bias, gate, _, scale, _, ctx.sizes = inputs
    hidden, _, statistics = results
    ctx.save_for_backward(hidden, branch, bias, gate, scale, statistics)
    ctx.set_materialize_grads(False)  # nothing may read hidden but the norm


def _backward(
    ctx: Any, grad_hidden: Tensor | None, grad_modulated: Tensor | None
) -> tuple[Tensor | None, ...]:
    from soar_mega.kernels.source.adaln import adaln_backward_kernel

    hidden, branch, bias, gate, scale, statistics = ctx.saved_tensors
    tokens, samples, width = hidden.shape
    sizes = ctx.sizes
    grad_hidden = None if grad_hidden is None else grad_hidden.contiguous()
    grad_modulated = torch.zeros_like(hidden) if grad_modulated is None else grad_modulated.contiguous()
    grad_residual = empty(hidden)
    grad_branch = None if branch is None else empty(hidden)
    kinds = 2 if branch is None else 3
    partials = torch.empty(sizes.backward_programs, kinds, samples, width, device=hidden.device)
    bias_sums = None
    if ctx.needs_input_grad[2]:
        bias_sums = torch.empty(sizes.backward_programs * samples, width, device=hidden.device)
    launch(
        adaln_backward_kernel, (sizes.backward_programs, samples), hidden.device,
        grad_hidden, grad_modulated, hidden, branch, bias, gate, scale, statistics,
        grad_residual, grad_branch, partials, bias_sums,
        tokens, samples, _stride(gate), scale.stride(0), **sizes.backward,
    )  # fmt: skip
    vectors, grad_bias = sum_lines(hidden.dtype, partials, bias_sums)
    assert vectors is not None
    grad_gate = None if branch is None else vectors[2]
    return grad_residual, grad_branch, grad_bias, grad_gate, vectors[0], vectors[1], None, None


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


_operation = define("adaln", forward=_forward, setup_context=_setup_context, backward=_backward, outputs=2)
