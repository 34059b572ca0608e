"""RMSNorm of queries and keys per head and, where positions are rotary, their rotation, in one pass over both.

    normed = x / sqrt(mean(x^2) + epsilon) weight          out = normed cos + (-normed_1, normed_0) sin, pair by pair

Pairs are neighbours (0, 1), (2, 3), ..., as in FLUX. Queries and keys are read where they lie, inside the fused qkv.
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
    launch,
    launches,
    once_per_layout,
    power_of_two,
)
from soar_mega.kernels.sums import sum_lines
from soar_mega.kernels.tables import launch_of

EPSILON = 1e-6
PROGRAMS = 528  # of the backward pass, at most: four for each multiprocessor of an H100


@dataclass(frozen=True)
class Sizes:
    """Of the launches for one layout of the arguments."""

    lines: int  # heads of all tokens
    strides: tuple[int, ...]  # of the query's tokens, samples and heads, and of the key's
    forward_programs: int
    forward: dict[str, int]  # what is known at compile time
    backward_programs: int
    backward: dict[str, int]


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention compares them, each [S, B, heads, D] contiguous in its own type.

    Args:
        query, key: [S, B, heads, D] float32, bfloat16 or float16, D even; they may be slices of the fused qkv: only
            D must be contiguous.
        query_weight, key_weight: [D] of the same type.
        cosine, sine: [S, D] float32, both or neither: each angle twice, as diffusers' FLUX gives them. They get no
            gradient.
        epsilon: added to the mean square.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    sizes = _checked(query, key, query_weight, key_weight, cosine, sine)
    if not launches(query.device):
        found = plain_qk_norm_rope(query, key, query_weight, key_weight, cosine, sine, epsilon)
        return found[0].contiguous(), found[1].contiguous()
    return _operation(query, key, query_weight, key_weight, cosine, sine, epsilon, sizes)


def plain_qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` by plain torch calls, which autograd differentiates."""
    query = torch.nn.functional.rms_norm(query, query.shape[-1:], query_weight, epsilon)
    key = torch.nn.functional.rms_norm(key, key.shape[-1:], key_weight, epsilon)
    if cosine is None or sine is None:
        return query, key
    return _rotate(query, cosine, sine).to(query.dtype), _rotate(key, cosine, sine).to(key.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[S, B, heads, D] -> x cos + (-x1, x0) sin, float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x.float() * cosine[:, None, None] + turned * sine[:, None, None]


@once_per_layout
def _checked(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> Sizes:
    check_tensor("query", query, shape=("S", "B", "heads", "D"), strided=True)
    tokens, samples, heads, width = query.shape
    if width % 2:
        raise ValueError(f"query must have an even head size D, not {width}: it is rotated in pairs")
    if tokens * samples * heads > LARGEST_ROW:
        raise ValueError(
            f"query has {tokens * samples * heads} heads in all; at most {LARGEST_ROW} can be indexed"
        )
    alike: dict[str, Any] = {"dtypes": (query.dtype,), "device": query.device}
    check_tensor("key", key, shape=tuple(query.shape), strided=True, **alike)
    check_tensor("query_weight", query_weight, shape=(width,), **alike)
    check_tensor("key_weight", key_weight, shape=(width,), **alike)
    if (cosine is None) != (sine is None):
        raise ValueError("cosine and sine go together: give both or neither")
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table is not None:
            check_tensor(name, table, shape=(tokens, width), dtypes=(torch.float32,), device=query.device)
    lines = tokens * samples * heads
    forward, backward = (_constants(way, query, cosine) for way in ("forward", "backward"))
    return Sizes(
        lines,
        (*query.stride()[:3], *key.stride()[:3]),
        -(-lines // forward["LINES"]),
        forward,
        min(PROGRAMS, -(-lines // backward["LINES"])),
        backward,
    )


def _constants(direction: str, query: Tensor, cosine: Tensor | None) -> dict[str, int]:
    """What the sources must know at compile time."""
    shape_class = direction if cosine is None else f"{direction} rotary"
    entry = launch_of("qk_norm_rope", shape_class, architecture(query.device))
    width = power_of_two(query.shape[-1])
    lines = max(1, entry.block // width)
    return {"D": query.shape[-1], "WIDTH": width, "LINES": lines, "num_warps": entry.num_warps}


def _forward(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    epsilon: float,
    sizes: Sizes,
) -> tuple[Tensor, Tensor]:
    from soar_mega.kernels.source.qk_norm_rope import forward_kernel

    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    launch(
        forward_kernel, (sizes.forward_programs,), query.device,
        query, key, query_weight, key_weight, cosine, sine, query_out, key_out,
        sizes.lines, *query.shape[1:3], *sizes.strides, epsilon, **sizes.forward,
    )  # fmt: skip
    return query_out, key_out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.epsilon, ctx.sizes = inputs[6:]


def _backward(ctx: Any, grad_query_out: Tensor, grad_key_out: Tensor) -> tuple[Tensor | None, ...]:
    from soar_mega.kernels.source.qk_norm_rope import backward_kernel

    query, key, query_weight, key_weight, cosine, sine = ctx.saved_tensors
    sizes: Sizes = ctx.sizes
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    partials = torch.empty(sizes.backward_programs, 2, query.shape[-1], device=query.device)
    launch(
        backward_kernel, (sizes.backward_programs,), query.device,
        grad_query_out.contiguous(), grad_key_out.contiguous(), query, key, query_weight, key_weight, cosine, sine,
        grad_query, grad_key, partials,
        sizes.lines, *query.shape[1:3], *sizes.strides, ctx.epsilon, **sizes.backward,
    )  # fmt: skip
    grad_weights = sum_lines(partials, query_weight.dtype).unbind()
    return grad_query, grad_key, *grad_weights, None, None, None, None


_operation = define("qk_norm_rope", forward=_forward, setup_context=_setup_context, backward=_backward)
