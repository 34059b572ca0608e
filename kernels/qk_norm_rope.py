"""Queries, keys and values of a joint attention, written in one pass from each stream's fused qkv.

    x = mixed + bias    normed = x / sqrt(mean(x^2) + epsilon) weight    out = normed cos + (-normed_1, normed_0) sin

Values take their bias alone. Pairs are neighbours (0, 1), (2, 3), ..., as in FLUX. The streams come out one after the
other, so nothing is copied to join them. The backward pass writes the gradient of each fused qkv; those of its bias and
of the norms' weights are added up on the way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import (
    LARGEST_ROW,
    architecture,
    check_tensor,
    interpreted,
    launch,
    power_of_two,
)
from soar_mega.kernels.sums import sum_lines
from soar_mega.kernels.tables import Launch, launch_of

EPSILON = 1e-6
PROGRAMS = 528  # of the backward pass, at most: four for each multiprocessor of an H100
HEADS = 8  # that a program of the backward pass takes at a time, at most


class Projected(NamedTuple):
    """A stream as the linear before attention leaves it.

    mixed: [S, B, heads x 3 x D], query, key and value of each head side by side. length: the tokens that attention is
    to see, the first ones; the rest are padding. bias: [heads x 3 x D], if it is not in `mixed` yet. query_weight,
    key_weight: [D] of RMSNorm, both or neither.
    """

    mixed: Tensor
    length: int
    bias: Tensor | None = None
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None


def qk_norm_rope(
    streams: Sequence[Projected],
    head_size: int,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all streams, one after the other: each [sum of lengths, B, heads, D] contiguous.

    Args:
        streams: float32, bfloat16 or float16, contiguous, alike in type, device, B and heads.
        head_size: D, even.
        cosine, sine: [sum of lengths, D] float32, both or neither: each angle twice, as diffusers' FLUX gives them.
            They get no gradient.
        epsilon: added to the mean square.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    _check(streams, head_size, cosine, sine)
    lengths = tuple(stream.length for stream in streams)
    tensors = (x for s in streams for x in (s.mixed, s.bias, s.query_weight, s.key_weight))
    return _QkNormRope.apply(lengths, head_size, epsilon, cosine, sine, *tensors)


def plain_qk_norm_rope(
    streams: Sequence[Projected],
    head_size: int,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` by plain torch calls, which autograd differentiates."""
    normed = [_plain_one(stream, head_size, epsilon) for stream in streams]
    query, key, value = (torch.cat(parts) for parts in zip(*normed))
    if cosine is None or sine is None:
        return query, key, value
    return _rotate(query, cosine, sine).to(query.dtype), _rotate(key, cosine, sine).to(key.dtype), value


def _plain_one(stream: Projected, head_size: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """One stream's q, k, v [length, B, heads, D]."""
    mixed = stream.mixed[: stream.length]
    if stream.bias is not None:
        mixed = mixed + stream.bias
    query, key, value = mixed.unflatten(-1, (-1, 3, head_size)).unbind(3)
    if stream.query_weight is not None and stream.key_weight is not None:
        query = torch.nn.functional.rms_norm(query, (head_size,), stream.query_weight, epsilon)
        key = torch.nn.functional.rms_norm(key, (head_size,), stream.key_weight, epsilon)
    return query, key, value


def _check(streams: Sequence[Projected], head_size: int, cosine: Tensor | None, sine: Tensor | None) -> None:
    first = streams[0].mixed
    if head_size % 2:
        raise ValueError(f"head_size must be even, not {head_size}: queries and keys are rotated in pairs")
    for i, stream in enumerate(streams):
        alike: dict[str, Any] = {"dtypes": (first.dtype,), "device": first.device} if i else {}
        name = f"streams[{i}]."
        check_tensor(
            name + "mixed",
            stream.mixed,
            shape=("S", *(first.shape[1:] if i else ("B", "3 heads D"))),
            **alike,
        )
        alike = {"dtypes": (first.dtype,), "device": first.device}
        tokens, samples, width = stream.mixed.shape
        if width % (3 * head_size):
            raise ValueError(f"{name}mixed must hold whole heads of 3 x {head_size}, not {width} features")
        if not 0 < stream.length <= tokens:
            raise ValueError(f"{name}length must be 1 to {tokens}, the tokens of mixed, not {stream.length}")
        if (stream.query_weight is None) != (stream.key_weight is None):
            raise ValueError(f"{name}query_weight and {name}key_weight go together: give both or neither")
        for part, size in (("bias", width), ("query_weight", head_size), ("key_weight", head_size)):
            vector = getattr(stream, part)
            if vector is not None:
                check_tensor(name + part, vector, shape=(size,), **alike)
    tokens = sum(stream.length for stream in streams)
    if tokens * samples * (width // (3 * head_size)) > LARGEST_ROW:
        raise ValueError(f"streams have more than {LARGEST_ROW} heads in all: they cannot be indexed")
    if (cosine is None) != (sine is None):
        raise ValueError("cosine and sine go together: give both or neither")
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table is not None:
            check_tensor(name, table, shape=(tokens, head_size), dtypes=(torch.float32,), device=first.device)


class _QkNormRope(torch.autograd.Function):
    """Tensors come four by four: mixed, bias, query_weight and key_weight of each stream."""

    @staticmethod
    def forward(
        ctx: Any,
        lengths: tuple[int, ...],
        head_size: int,
        epsilon: float,
        cosine: Tensor | None,
        sine: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine, *tensors)
        ctx.lengths, ctx.head_size, ctx.epsilon = lengths, head_size, epsilon
        streams = _streams(lengths, tensors)
        function = _triton_forward if _runs_triton(streams[0].mixed) else plain_qk_norm_rope
        return function(streams, head_size, cosine, sine, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine, *tensors = ctx.saved_tensors
        streams = _streams(ctx.lengths, tensors)
        strides = gradients[0].stride()
        if strides[-1] != 1 or any(gradient.stride() != strides for gradient in gradients):
            gradients = tuple(gradient.contiguous() for gradient in gradients)
        function = _triton_backward if _runs_triton(streams[0].mixed) else _eager_backward
        found: list[Tensor | None] = []
        first = 0
        for i, stream in enumerate(streams):
            wants_bias = ctx.needs_input_grad[5 + 4 * i + 1]
            found += function(gradients, stream, first, wants_bias, ctx.head_size, cosine, sine, ctx.epsilon)
            first += stream.length
        return None, None, None, None, None, *found


def _streams(lengths: tuple[int, ...], tensors: Sequence[Any]) -> list[Projected]:
    return [Projected(tensors[4 * i], n, *tensors[4 * i + 1 : 4 * i + 4]) for i, n in enumerate(lengths)]


def _triton_forward(
    streams: Sequence[Projected],
    head_size: int,
    cosine: Tensor | None,
    sine: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from soar_mega.kernels.source.qk_norm_rope import forward_kernel

    mixed = streams[0].mixed
    samples, heads = mixed.shape[1], mixed.shape[2] // (3 * head_size)
    shape = (sum(stream.length for stream in streams), samples, heads, head_size)
    query, key, value = (torch.empty(shape, dtype=mixed.dtype, device=mixed.device) for _ in range(3))
    size = _launch("forward", mixed, cosine)
    width = power_of_two(head_size)
    block = max(1, size.block // width)
    first = 0
    for stream in streams:
        lines = stream.length * samples * heads
        launch(
            forward_kernel, (-(-lines // block),), mixed.device,
            stream.mixed, stream.bias, stream.query_weight, stream.key_weight, cosine, sine, query, key, value,
            lines, first, samples, heads, epsilon,
            D=head_size, WIDTH=width, LINES=block, num_warps=size.num_warps,
        )  # fmt: skip
        first += lines
    return query, key, value


def _triton_backward(
    gradients: Sequence[Tensor],
    stream: Projected,
    first: int,
    wants_bias: bool,
    head_size: int,
    cosine: Tensor | None,
    sine: Tensor | None,
    epsilon: float,
) -> list[Tensor | None]:
    """Gradients of mixed, bias, query_weight and key_weight of one stream. first: its first token in the sequence."""
    from soar_mega.kernels.source.qk_norm_rope import backward_kernel

    mixed, length = stream.mixed, stream.length
    rows, heads = length * mixed.shape[1], mixed.shape[2] // (3 * head_size)
    size = _launch("backward", mixed, cosine)
    width = power_of_two(head_size)
    lines = max(1, size.block // width)
    heads_block = min(HEADS, lines, power_of_two(heads))
    rows_block = lines // heads_block
    head_blocks = -(-heads // heads_block)
    programs = min(max(1, PROGRAMS // head_blocks), -(-rows // rows_block))
    grad_mixed = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    if length < len(mixed):
        grad_mixed[length:].zero_()
    bias_sums = torch.empty(programs, mixed.shape[2], device=mixed.device) if wants_bias else None
    weight_sums = None
    if stream.query_weight is not None:
        weight_sums = torch.empty(programs * head_blocks, 2, head_size, device=mixed.device)
    launch(
        backward_kernel, (programs, head_blocks), mixed.device,
        *gradients, mixed, stream.bias, stream.query_weight, stream.key_weight, cosine, sine,
        grad_mixed, bias_sums, weight_sums,
        rows, first, mixed.shape[1], heads, *gradients[0].stride()[:3], epsilon,
        D=head_size, WIDTH=width, ROWS=rows_block, HEADS=heads_block, num_warps=size.num_warps,
    )  # fmt: skip
    grad_bias = None if bias_sums is None else sum_lines(bias_sums, mixed.dtype)
    if weight_sums is None:
        return [grad_mixed, grad_bias, None, None]
    return [grad_mixed, grad_bias, *sum_lines(weight_sums, mixed.dtype)]


def _eager_backward(
    gradients: Sequence[Tensor],
    stream: Projected,
    first: int,
    wants_bias: bool,
    head_size: int,
    cosine: Tensor | None,
    sine: Tensor | None,
    epsilon: float,
) -> list[Tensor | None]:
    mixed, length = stream.mixed, stream.length
    tokens = slice(first, first + length)
    values = mixed[:length] if stream.bias is None else mixed[:length] + stream.bias
    grad_mixed = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    grad_mixed[length:].zero_()
    heads = (-1, 3, head_size)
    inputs, outputs = (
        values.unflatten(-1, heads).unbind(3),
        grad_mixed[:length].unflatten(-1, heads).unbind(3),
    )
    outputs[2].copy_(gradients[2][tokens])
    weights: list[Tensor | None] = []
    for i, weight in enumerate((stream.query_weight, stream.key_weight)):
        gradient = gradients[i][tokens]
        if cosine is not None and sine is not None:
            gradient = _rotate_back(gradient, cosine[tokens], sine[tokens])
        if weight is not None:
            gradient, grad_weight = _norm_back(gradient, inputs[i], weight, epsilon)
            weights.append(grad_weight)
        outputs[i].copy_(gradient)
    grad_bias = grad_mixed[:length].sum((0, 1)) if wants_bias else None
    return [grad_mixed, grad_bias, *(weights or [None, None])]


def _norm_back(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Through RMSNorm: the gradients of x, float32, and of the weight."""
    gradient, x = gradient.float(), x.float()
    inverse = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normed = x * inverse
    grad_weight = (gradient * normed).sum((0, 1, 2)).to(weight.dtype)
    gradient = gradient * weight.float()
    along = (gradient * normed).mean(-1, keepdim=True)
    return inverse * (gradient - normed * along), grad_weight


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[S, B, heads, D] -> x cos + (-x1, x0) sin, float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x.float() * cosine[:, None, None] + turned * sine[:, None, None]


def _rotate_back(gradient: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The transpose of `_rotate`, float32."""
    first, second = (gradient.float() * sine[:, None, None]).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([second, -first], dim=-1).flatten(-2)
    return gradient.float() * cosine[:, None, None] + turned


def _launch(direction: str, mixed: Tensor, cosine: Tensor | None) -> Launch:
    return launch_of(
        "qk_norm_rope", direction if cosine is None else f"{direction} rotary", architecture(mixed.device)
    )


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" or interpreted()
