"""Queries, keys and values of one or two streams against float64, on any device."""

import torch
from guards import canaries, guarded

from soar_mega.kernels.qk_norm_rope import Projected, qk_norm_rope

# A case is a shape, which is (tokens, padding) of each stream, samples, heads, head size, and some of ALL.
ALL = ("bias", "norm", "rotary")


def case(shape, has=ALL, dtype=torch.float32, device="cpu"):
    """Streams whose tensors are leaves, the tables of angles, and gradients of q, k, v that lie as attention's may."""
    tokens, samples, heads, width = shape
    generator = torch.Generator().manual_seed(sum(map(sum, tokens)))

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    def leaf(there, tensor):
        return guarded(tensor).requires_grad_() if there else None

    features, norm = 3 * heads * width, "norm" in has
    streams = [
        Projected(
            leaf(True, normal(length + padding, samples, features)),
            length,
            leaf("bias" in has, normal(features)),
            leaf(norm, normal(width)),
            leaf(norm, 1 + normal(width)),
        )
        for length, padding in tokens
    ]
    length = sum(stream.length for stream in streams)
    angles = torch.rand(length, width, generator=generator) * 6
    tables = [guarded(x.to(device)) if "rotary" in has else None for x in (angles.cos(), angles.sin())]
    return streams, tables, [normal(length, samples, heads, width) for _ in range(3)]


def leaves(streams):
    """{name: tensor} of what gets a gradient."""
    return {
        f"{name} of stream {i}": tensor
        for i, stream in enumerate(streams)
        for name, tensor in stream._asdict().items()
        if isinstance(tensor, torch.Tensor)
    }


def oracle(streams, width, cosine, sine):
    """Complex numbers in float64: another formula than the code's."""

    def normed(x, weight):
        return x if weight is None else x * weight / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x):
        if cosine is None:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        real, imaginary = pairs.real, pairs.imag
        cos, sin = (t.double()[:, None, None].unflatten(-1, (-1, 2)) for t in (cosine, sine))
        even, odd = real * cos[..., 0] - imaginary * sin[..., 0], imaginary * cos[..., 1] + real * sin[..., 1]
        return torch.stack([even, odd], dim=-1).flatten(-2)

    queries, keys, values = [], [], []
    for mixed, length, bias, query_weight, key_weight in streams:
        heads = (mixed if bias is None else mixed + bias)[:length].unflatten(-1, (-1, 3, width))
        queries.append(normed(heads[..., 0, :], query_weight))
        keys.append(normed(heads[..., 1, :], key_weight))
        values.append(heads[..., 2, :])
    return turned(torch.cat(queries)), turned(torch.cat(keys)), torch.cat(values)


def outcome(shape, has, dtype, device="cpu"):
    """{name: (found, float64)} of the three outputs and all gradients."""
    streams, tables, gradients = case(shape, has, dtype, device)
    inputs = leaves(streams)
    with canaries():
        outputs = qk_norm_rope(streams, shape[-1], *tables)
        found = torch.autograd.grad(outputs, list(inputs.values()), [guarded(g) for g in gradients])
    assert all(x.is_contiguous() and x.dtype == dtype for x in outputs)
    exact = [
        Projected(*(x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in s))
        for s in streams
    ]
    wanted = oracle(exact, shape[-1], *tables)
    wanted = (
        *wanted,
        *torch.autograd.grad(wanted, list(leaves(exact).values()), [g.double() for g in gradients]),
    )
    names = ("queries", "keys", "values", *inputs)
    return {
        name: (mine.detach(), theirs.detach())
        for name, mine, theirs in zip(names, (*outputs, *found), wanted, strict=True)
    }
