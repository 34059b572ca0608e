"""A gated branch joins the residual stream, with the bias that the branch's last linear left.

    out = residual + gate (branch + bias)

The gradients of gate and bias are sums over tokens: each program adds up its own, and a second, small launch adds those
up in a fixed order. On the CPU the same is done by plain torch calls.
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
)
from soar_mega.kernels.sums import sum_lines
from soar_mega.kernels.tables import launch_of, width_class

FORWARD_TOKENS = 4  # of a program
BACKWARD_TOKENS = 32  # of a program: its sums are written once


@dataclass(frozen=True)
class Sizes:
    """Of the launches for one layout of the arguments."""

    forward_grid: tuple[int, int, int]
    backward_grid: tuple[int, int, int]
    constants: dict[str, int]


def gated_add(residual: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + gate (branch + bias), [S, B, H] in the type of `residual`.

    Args:
        residual, branch: [S, B, H] float32, bfloat16 or float16, contiguous.
        gate: [B, H] of the same type and device; may be a slice of a wider tensor.
        bias: [H], or None where it is in `branch` already.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    sizes = _checked(residual, branch, gate, bias)
    if not launches(residual.device):
        return plain_gated_add(residual, branch, gate, bias)
    return _operation(residual, branch, gate, bias, sizes)


def plain_gated_add(residual: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gated_add` by plain torch calls, which autograd differentiates."""
    return torch.addcmul(residual, gate, branch if bias is None else branch + bias)


@once_per_layout
def _checked(residual: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Sizes:
    check_tensor("residual", residual, shape=("S", "B", "H"))
    tokens, samples, width = residual.shape
    if max(tokens, width) > LARGEST_ROW:
        raise ValueError(
            f"residual has {tokens} tokens of {width}; at most {LARGEST_ROW} of either can be indexed"
        )
    alike: dict[str, Any] = {"dtypes": (residual.dtype,), "device": residual.device}
    check_tensor("branch", branch, shape=(tokens, samples, width), **alike)
    check_tensor("gate", gate, shape=(samples, width), strided=True, **alike)
    if bias is not None:
        check_tensor("bias", bias, shape=(width,), **alike)
    entry = launch_of("gated_add", width_class(residual), architecture(residual.device))
    columns = -(-width // entry.block)
    return Sizes(
        forward_grid=(-(-tokens // FORWARD_TOKENS), samples, columns),
        backward_grid=(-(-tokens // BACKWARD_TOKENS), samples, columns),
        constants={"BLOCK": entry.block, "num_warps": entry.num_warps},
    )


def _forward(residual: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    from soar_mega.kernels.source.gated_add import gated_add_forward_kernel

    tokens, samples, width = residual.shape
    out = empty(residual)
    launch(
        gated_add_forward_kernel, sizes.forward_grid, residual.device,
        residual, branch, bias, gate, out, tokens, samples, FORWARD_TOKENS, width, gate.stride(0), **sizes.constants,
    )  # fmt: skip
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], out: Tensor) -> None:
    _, branch, gate, bias, ctx.sizes = inputs
    ctx.save_for_backward(branch, gate, bias)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    from soar_mega.kernels.source.gated_add import gated_add_backward_kernel

    branch, gate, bias = ctx.saved_tensors
    tokens, samples, width = branch.shape
    grid = ctx.sizes.backward_grid
    grad_branch = empty(branch)
    gate_sums = torch.empty(grid[0], samples, width, device=branch.device)
    bias_sums = (
        torch.empty(grid[0] * samples, width, device=branch.device) if ctx.needs_input_grad[3] else None
    )
    launch(
        gated_add_backward_kernel, grid, branch.device,
        grad_out.contiguous(), branch, bias, gate, grad_branch, gate_sums, bias_sums,
        tokens, samples, BACKWARD_TOKENS, width, gate.stride(0), **ctx.sizes.constants,
    )  # fmt: skip
    grad_gate, grad_bias = sum_lines(branch.dtype, gate_sums, bias_sums)
    return grad_out, grad_branch, grad_gate, grad_bias, None


_operation = define("gated_add", forward=_forward, setup_context=_setup_context, backward=_backward)
