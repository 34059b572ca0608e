"""One adaLN with a branch against float64, on any device."""

import torch
from guards import canaries, guarded

from soar_mega.kernels.adaln import adaln, plain_adaln

NAMES = ("hidden", "modulated", "residual", "shift", "scale", "branch", "gate", "bias")


def case(shape, dtype=torch.float32, device="cpu"):
    """Residual, branch, shift, scale, gate, each far from zero mean; the vectors are slices of one tensor."""
    tokens, samples, width = shape
    generator = torch.Generator().manual_seed(tokens)
    streams = [
        guarded(torch.randn(shape, generator=generator).to(device, dtype) + offset).requires_grad_()
        for offset in (1, 0)
    ]
    wide = guarded(torch.randn(samples, 3 * width, generator=generator).to(device, dtype))
    vectors = [part.detach().requires_grad_() for part in wide.chunk(3, dim=-1)]
    return streams, vectors


def exact(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def upstream(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]


def outcome(shape, dtype, device="cpu"):
    """{name: (found, float64)} of both outputs and the six gradients.

    In float64 the norm is of the residual stream as the kernel has stored it: that rounding is no error of the rest.
    """
    (residual, branch), (shift, scale, gate) = case(shape, dtype, device)
    gradients = upstream(shape, dtype, device)
    bias = guarded(gradients[0][0, 0].flip(0)).requires_grad_()
    inputs = [residual, shift, scale, branch, gate, bias]
    with canaries():
        outputs = adaln(*inputs)
        found = torch.autograd.grad(outputs, inputs, [guarded(g) for g in gradients])
    assert outputs[0].dtype == outputs[1].dtype == dtype
    reference = exact(inputs)
    hidden = plain_adaln(*reference)[0]
    rounded = hidden + (outputs[0].detach().double() - hidden.detach())
    wanted = [hidden, plain_adaln(rounded, *reference[1:3])[1]]
    wanted += torch.autograd.grad(wanted, reference, [g.double() for g in gradients])
    return {
        name: (mine.detach(), theirs.detach())
        for name, mine, theirs in zip(NAMES, (*outputs, *found), wanted)
    }
