"""A gated branch joining the residual against float64, on any device."""

import torch
from guards import canaries, guarded

from soar_mega.kernels.gated_add import gated_add


def case(shape, with_bias, dtype=torch.float32, device="cpu"):
    """residual, branch, gate (a slice of a wider tensor) and bias (or None) as leaves, and a gradient."""
    generator = torch.Generator().manual_seed(shape[0])

    def normal(*size):
        return guarded(torch.randn(size, generator=generator).to(device, dtype))

    _, samples, width = shape
    gate = normal(samples, 3 * width)[:, width : 2 * width]
    inputs = [normal(*shape), normal(*shape), gate, normal(width)]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return leaves if with_bias else [*leaves[:3], None], normal(*shape)


def outcome(shape, with_bias, dtype, device="cpu"):
    """{name: (found, float64)} of the output and the gradients."""
    inputs, gradient = case(shape, with_bias, dtype, device)
    given = [tensor for tensor in inputs if tensor is not None]
    with canaries():
        out = gated_add(*inputs)
        found = torch.autograd.grad(out, given, gradient)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    wanted = exact[0] + exact[2] * (exact[1] + exact[3] if with_bias else exact[1])
    wanted = (wanted, *torch.autograd.grad(wanted, exact, gradient.double()))
    names = ("out", "residual", "branch", "gate", "bias")
    return {n: (mine.detach(), theirs.detach()) for n, mine, theirs in zip(names, (out, *found), wanted)}
