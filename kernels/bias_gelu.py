"""GELU by its tanh form, of what a linear without its bias has left, in one pass.

    out = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), x = linear's output + bias

The bias's gradient is the sum over rows of the gradient that the backward pass writes: each program adds up its own. On
the CPU the same is done by plain torch calls.
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

PROGRAMS = 1056  # of the backward pass, at most: eight for each multiprocessor of an H100
FORWARD_ROWS = 4  # of a program
BACKWARD_ROWS = 16  # of a program, at least: its sums are written once


@dataclass(frozen=True)
class Sizes:
    """Of the launches for one layout of the arguments: rows in all and of each program, grids, the rest."""

    rows: int
    forward_rows: int
    forward_grid: tuple[int, int]
    backward_rows: int
    backward_grid: tuple[int, int]
    constants: dict[str, int]


def bias_gelu(x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """GELU(x + bias), like x.

    Args:
        x: [S, B, F] float32, bfloat16 or float16, contiguous.
        bias: [F] of the same type, or None where it is in x already.
        out: like x; the result is written there, and nothing gets a gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    sizes = _checked(x, bias, out)
    if not launches(x.device):
        return plain_bias_gelu(x, bias, out)
    if out is not None:
        return _forward(x, bias, sizes, out)
    return _operation(x, bias, sizes)


def plain_bias_gelu(x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`bias_gelu` by plain torch calls, which autograd differentiates."""
    result = torch.nn.functional.gelu(x if bias is None else x + bias, approximate="tanh")
    return result if out is None else out.copy_(result)


@once_per_layout
def _checked(x: Tensor, bias: Tensor | None, out: Tensor | None) -> Sizes:
    check_tensor("x", x, shape=("S", "B", "F"))
    tokens, samples, width = x.shape
    if max(tokens * samples, width) > LARGEST_ROW:
        raise ValueError(
            f"x has {tokens * samples} rows of {width}; at most {LARGEST_ROW} of either can be indexed"
        )
    if bias is not None:
        check_tensor("bias", bias, shape=(width,), dtypes=(x.dtype,), device=x.device)
    if out is not None:
        check_tensor("out", out, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    rows = tokens * samples
    entry = launch_of("bias_gelu", width_class(x), architecture(x.device))
    columns = -(-width // entry.block)
    backward_rows = max(BACKWARD_ROWS, -(-rows * columns // PROGRAMS))
    return Sizes(
        rows=rows,
        forward_rows=FORWARD_ROWS,
        forward_grid=(-(-rows // FORWARD_ROWS), columns),
        backward_rows=backward_rows,
        backward_grid=(-(-rows // backward_rows), columns),
        constants={"BLOCK": entry.block, "num_warps": entry.num_warps},
    )


def _forward(x: Tensor, bias: Tensor | None, sizes: Sizes, out: Tensor | None = None) -> Tensor:
    from soar_mega.kernels.source.bias_gelu import bias_gelu_forward_kernel

    out = empty(x) if out is None else out
    launch(
        bias_gelu_forward_kernel, sizes.forward_grid, x.device,
        x, bias, out, sizes.rows, sizes.forward_rows, x.shape[2], **sizes.constants,
    )  # fmt: skip
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], out: Tensor) -> None:
    x, bias, ctx.sizes = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    from soar_mega.kernels.source.bias_gelu import bias_gelu_backward_kernel

    x, bias = ctx.saved_tensors
    sizes, width = ctx.sizes, x.shape[2]
    grad_x = empty(x)
    sums = torch.empty(sizes.backward_grid[0], width, device=x.device) if ctx.needs_input_grad[1] else None
    launch(
        bias_gelu_backward_kernel, sizes.backward_grid, x.device,
        grad_out.contiguous(), x, bias, grad_x, sums, sizes.rows, sizes.backward_rows, width, **sizes.constants,
    )  # fmt: skip
    return grad_x, *sum_lines(x.dtype, sums), None


_operation = define("bias_gelu", forward=_forward, setup_context=_setup_context, backward=_backward)
