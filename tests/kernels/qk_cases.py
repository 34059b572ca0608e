"""One QK norm with or without its rotary embedding against float64, on any device."""

import torch
from guards import canaries, guarded

from soar_mega.kernels.qk_norm_rope import qk_norm_rope

NAMES = ("queries", "keys", "query", "key", "query_weight", "key_weight")


def case(shape, rotary, dtype=torch.float32, device="cpu"):
    """Queries and keys as slices of the fused qkv [S, B, heads, 3, D], their weights, and the tables of angles."""
    generator = torch.Generator().manual_seed(shape[0])

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    mixed = guarded(normal(*shape[:3], 3, shape[3]))
    inputs = [mixed[..., 0, :], mixed[..., 1, :], guarded(normal(shape[3])), guarded(1 + normal(shape[3]))]
    inputs = [x.detach().requires_grad_() for x in inputs]
    angles = torch.rand(shape[0], shape[3], generator=generator) * 6
    tables = [guarded(angles.cos().to(device)), guarded(angles.sin().to(device))] if rotary else [None, None]
    return inputs, tables, [normal(*shape), normal(*shape)]


def oracle(query, key, query_weight, key_weight, cosine, sine):
    """Complex numbers in float64: another formula than the code's."""

    def one(x, weight):
        x = x * weight / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if cosine is None:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        real, imaginary = pairs.real, pairs.imag
        cos, sin = (t.double()[:, None, None].unflatten(-1, (-1, 2)) for t in (cosine, sine))
        even, odd = real * cos[..., 0] - imaginary * sin[..., 0], imaginary * cos[..., 1] + real * sin[..., 1]
        return torch.stack([even, odd], dim=-1).flatten(-2)

    return one(query, query_weight), one(key, key_weight)


def outcome(shape, rotary, dtype, device="cpu"):
    """{name: (found, float64)} of both outputs and the four gradients."""
    inputs, tables, gradients = case(shape, rotary, dtype, device)
    with canaries():
        outputs = qk_norm_rope(*inputs, *tables)
        found = torch.autograd.grad(outputs, inputs, [guarded(g) for g in gradients])
    assert all(x.is_contiguous() and x.dtype == dtype for x in outputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = oracle(*exact, *tables)
    wanted = (*wanted, *torch.autograd.grad(wanted, exact, [g.double() for g in gradients]))
    return {
        name: (mine.detach(), theirs.detach())
        for name, mine, theirs in zip(NAMES, (*outputs, *found), wanted)
    }
