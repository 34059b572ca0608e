"""Queries, keys and values of a joint attention, written in one pass from each stream's fused qkv.

    x = mixed + bias    normed = x / sqrt(mean(x^2) + epsilon) weight    out = normed cos + (-normed_1, normed_0) sin

Values take their bias alone. Pairs are neighbours (0, 1), (2, 3), ..., as in FLUX. The streams come out one after the
other, so nothing is copied to join them. The backward pass writes the gradient of each fused qkv; those of its bias and
of the norms' weights are added up on the way. On the CPU the same is done by plain torch calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from soar_mega.kernels.sums import sum_lines
from soar_mega.kernels.tables import launch_of

EPSILON = 1e-6
PROGRAMS = 264  # of the backward pass, at most: two for each multiprocessor of an H100
HEADS = 8  # that such a program takes at a time, at most
ROWS_EACH = 16  # tokens of one sample whose sums it adds up at least: they are written once per program


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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one stream: its tokens, its launches' grids, and what they know at compile time."""

    length: int
    heads: int
    forward_grid: tuple[int]
    forward: dict[str, int]
    backward_grid: tuple[int, int]
    backward: dict[str, int]


def qk_norm_rope(
    streams: Sequence[Projected],
    head_size: int,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    epsilon: float = EPSILON,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all streams, one after the other: each [sum of lengths, B, heads, D] contiguous.

    Args:
        streams: float32, bfloat16 or float16, contiguous, alike in type, device, B and heads.
        head_size: D, even.
        cosine, sine: [sum of lengths, D] float32, both or neither: each angle twice, as diffusers' FLUX gives them.
            They get no gradient.
        epsilon: added to the mean square.
        out: like the results, which are written there, and nothing gets a gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, empty, or not contiguous; the message names it.
    """
    lengths = tuple([stream.length for stream in streams])
    tensors = [x for s in streams for x in (s.mixed, s.bias, s.query_weight, s.key_weight)]
    sizes = _checked(lengths, head_size, cosine, sine, *tensors)
    if out is not None:
        _check_out(out, streams[0].mixed, sum(lengths), head_size)
    if not launches(streams[0].mixed.device):
        return plain_qk_norm_rope(streams, head_size, cosine, sine, epsilon, out)
    if out is not None:
        return _forward(*tensors, cosine, sine, epsilon, sizes, out=out)
    return _operation(*tensors, cosine, sine, epsilon, sizes)


def plain_qk_norm_rope(
    streams: Sequence[Projected],
    head_size: int,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    epsilon: float = EPSILON,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` by plain torch calls, which autograd differentiates."""
    normed = [_plain_one(stream, head_size, epsilon) for stream in streams]
    query, key, value = (torch.cat(parts) for parts in zip(*normed))
    if cosine is not None and sine is not None:
        query, key = (_rotate(x, cosine, sine).to(x.dtype) for x in (query, key))
    if out is None:
        return query, key, value
    for place, result in zip(out, (query, key, value), strict=True):
        place.copy_(result)
    return out


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


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[S, B, heads, D] -> x cos + (-x1, x0) sin, float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x.float() * cosine[:, None, None] + turned * sine[:, None, None]


@once_per_layout
def _checked(
    lengths: tuple[int, ...],
    head_size: int,
    cosine: Tensor | None,
    sine: Tensor | None,
    *tensors: Tensor | None,
) -> list[Sizes]:
    if head_size % 2:
        raise ValueError(f"head_size must be even, not {head_size}: queries and keys are rotated in pairs")
    streams = _streams(lengths, tensors)
    for i in range(len(streams)):
        _check_stream(f"streams[{i}].", streams[i], streams[0].mixed, head_size)
    if (cosine is None) != (sine is None):
        raise ValueError("cosine and sine go together: give both or neither")
    mixed, length = streams[0].mixed, sum(lengths)
    for name, table in (("cosine", cosine), ("sine", sine)):
        if table is not None:
            check_tensor(name, table, shape=(length, head_size), dtypes=(torch.float32,), device=mixed.device)
    _, samples, width = mixed.shape
    heads = width // (3 * head_size)
    if length * samples * heads > LARGEST_ROW:
        raise ValueError(f"streams have more than {LARGEST_ROW} heads in all: they cannot be indexed")
    return [_sizes(stream, heads, head_size, "" if cosine is None else " rotary") for stream in streams]


def _check_stream(name: str, stream: Projected, first: Tensor, head_size: int) -> None:
    """`first`: `mixed` of the first stream, to which all others are alike."""
    alike: dict[str, Any] = {"dtypes": (first.dtype,), "device": first.device}
    if stream.mixed is first:
        check_tensor(name + "mixed", first, shape=("S", "B", "heads x 3 x D"))
    else:
        check_tensor(name + "mixed", stream.mixed, shape=("S", *first.shape[1:]), **alike)
    tokens, _, width = stream.mixed.shape
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


def _check_out(out: Sequence[Tensor], mixed: Tensor, length: int, head_size: int) -> None:
    _, samples, width = mixed.shape
    shape = (length, samples, width // (3 * head_size), head_size)
    for i, tensor in enumerate(out):
        check_tensor(f"out[{i}]", tensor, shape=shape, dtypes=(mixed.dtype,), device=mixed.device)


def _sizes(stream: Projected, heads: int, head_size: int, kind: str) -> Sizes:
    width, samples = power_of_two(head_size), stream.mixed.shape[1]
    found = architecture(stream.mixed.device)
    entry = launch_of("qk_norm_rope", "forward" + kind, found)
    block = max(1, entry.block // width)
    forward_grid = (-(-stream.length * samples * heads // block),)
    common = {"D": head_size, "WIDTH": width}
    forward = common | {"LINES": block, "num_warps": entry.num_warps}
    entry = launch_of("qk_norm_rope", "backward" + kind, found)
    block = max(1, entry.block // width)
    heads_block = min(HEADS, block, power_of_two(heads))
    rows_block = block // heads_block
    head_blocks = -(-heads // heads_block)
    programs = min(max(1, PROGRAMS // head_blocks), -(-stream.length * samples // max(rows_block, ROWS_EACH)))
    return Sizes(
        length=stream.length,
        heads=heads,
        forward_grid=forward_grid,
        forward=forward,
        backward_grid=(programs, head_blocks),
        backward=common | {"ROWS": rows_block, "HEADS": heads_block, "num_warps": entry.num_warps},
    )


def _streams(lengths: Sequence[int], tensors: Sequence[Any]) -> list[Projected]:
    """Tensors come four by four: mixed, bias, query_weight and key_weight of each stream."""
    return [Projected(tensors[4 * i], n, *tensors[4 * i + 1 : 4 * i + 4]) for i, n in enumerate(lengths)]


def _forward(
    *arguments: Any, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from soar_mega.kernels.source.qk_norm_rope import qk_norm_forward_kernel

    *tensors, cosine, sine, epsilon, sizes = arguments
    mixed, samples, heads = tensors[0], tensors[0].shape[1], sizes[0].heads
    lengths = [size.length for size in sizes]
    shape = (sum(lengths), samples, heads, sizes[0].forward["D"])
    query, key, value = out or (torch.empty(shape, dtype=mixed.dtype, device=mixed.device) for _ in range(3))
    parts = _parts(lengths, cosine, sine, query, key, value)
    for i, size in enumerate(sizes):
        launch(
            qk_norm_forward_kernel, size.forward_grid, mixed.device,
            *tensors[4 * i : 4 * i + 4], *parts[i],
            size.length * samples * heads, samples, heads, epsilon,
            **size.forward,
        )  # fmt: skip
    return query, key, value


def _setup_context(ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    *tensors, ctx.epsilon, ctx.sizes = arguments
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cosine, sine = ctx.saved_tensors
    strides = gradients[0].stride()
    if strides[-1] != 1 or any(gradient.stride() != strides for gradient in gradients):
        gradients = tuple(gradient.contiguous() for gradient in gradients)
    parts = _parts([size.length for size in ctx.sizes], cosine, sine, *gradients)
    found: list[Tensor | None] = []
    for i, size in enumerate(ctx.sizes):
        wants_bias = ctx.needs_input_grad[4 * i + 1]
        found += _backward_of_one(tensors[4 * i : 4 * i + 4], parts[i], ctx.epsilon, size, wants_bias)
    return (*found, None, None, None, None)


def _backward_of_one(
    tensors: Sequence[Any], part: tuple[Any, ...], epsilon: float, size: Sizes, wants_bias: bool
) -> list[Tensor | None]:
    """Gradients of mixed, bias, query_weight and key_weight of one stream."""
    from soar_mega.kernels.source.qk_norm_rope import qk_norm_backward_kernel

    cosine, sine, *gradients = part
    mixed, weight = tensors[0], tensors[2]
    samples, device = mixed.shape[1], mixed.device
    programs, head_blocks = size.backward_grid
    grad_mixed = empty(mixed)
    if size.length < len(mixed):
        grad_mixed[size.length :].zero_()
    bias_sums = torch.empty(programs, mixed.shape[2], device=device) if wants_bias else None
    weight_sums = None
    if weight is not None:
        weight_sums = torch.empty(programs * head_blocks, 2, len(weight), device=device)
    launch(
        qk_norm_backward_kernel, size.backward_grid, device,
        *gradients, *tensors, cosine, sine, grad_mixed, bias_sums, weight_sums,
        size.length * samples, samples, size.heads, *gradients[0].stride()[:3], epsilon, **size.backward,
    )  # fmt: skip
    grad_bias, weights = sum_lines(mixed.dtype, bias_sums, weight_sums)
    return [grad_mixed, grad_bias, *((None, None) if weights is None else weights)]


def _parts(lengths: list[int], *joint: Tensor | None) -> list[Any]:
    """Each stream's tokens of tensors that hold all streams."""
    if len(lengths) == 1:
        return [joint]
    cut = [(None,) * len(lengths) if x is None else x.split(lengths) for x in joint]
    return list(zip(*cut, strict=True))


_operation = define("qk_norm_rope", forward=_forward, setup_context=_setup_context, backward=_backward)
