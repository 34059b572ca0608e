"""Bias and GELU against float64, on any device."""

import torch
from guards import canaries, guarded

from soar_mega.kernels.bias_gelu import bias_gelu


def case(shape, with_bias, dtype=torch.float32, device="cpu"):
    """x, bias (or None) as leaves, and a gradient."""
    generator = torch.Generator().manual_seed(shape[0])
    x, bias, gradient = (
        torch.randn(size, generator=generator).to(device, dtype) for size in (shape, shape[-1:], shape)
    )
    if x.numel() > 64:  # where GELU is flat on either side too, and zero
        x.view(-1)[:4] = torch.tensor([0.0, -60.0, 60.0, -4.0])
    leaves = [guarded(tensor).requires_grad_() for tensor in (x, bias)]
    return leaves[0], leaves[1] if with_bias else None, gradient


def outcome(shape, with_bias, dtype, device="cpu"):
    """{name: (found, float64)} of the output and the gradients."""
    x, bias, gradient = case(shape, with_bias, dtype, device)
    inputs = [tensor for tensor in (x, bias) if tensor is not None]
    with canaries():
        out = bias_gelu(x, bias)
        found = torch.autograd.grad(out, inputs, guarded(gradient))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = sum(exact)
    wanted = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    wanted = (wanted, *torch.autograd.grad(wanted, exact, gradient.double()))
    names = ("out", "x", "bias")
    return {n: (mine.detach(), theirs.detach()) for n, mine, theirs in zip(names, (out, *found), wanted)}
