"""What FP8 does to numbers, on any device: inputs, weights and gradients of the layers' linears are rounded to E4M3 or
E5M2 with a scale per tensor that is taken from the tensor itself, and multiplied as they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {"e4m3": (E4M3, E4M3), "hybrid": (E4M3, E5M2)}  # of inputs and weights, and of gradients

Round = Callable[[Tensor, torch.dtype], Tensor]


def current_scaling(x: Tensor, kind: torch.dtype) -> Tensor:
    """x with its largest number at the largest of `kind`, rounded there and scaled back."""
    largest = torch.finfo(kind).max
    scale = largest / x.detach().float().abs().amax().clamp(min=1e-30)
    return ((x.float() * scale).clamp(-largest, largest).to(kind).float() / scale).to(x.dtype)


def scale_of_one(x: Tensor, kind: torch.dtype) -> Tensor:
    """What goes wrong when no scale is ever found: small gradients become zero."""
    largest = torch.finfo(kind).max
    return x.float().clamp(-largest, largest).to(kind).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, kinds: tuple[torch.dtype, torch.dtype], cast: Round
    ) -> Tensor:
        x, weight = cast(x, kinds[0]), cast(weight, kinds[0])
        ctx.save_for_backward(x, weight)
        ctx.kind, ctx.cast = kinds[1], cast
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        gradient = ctx.cast(gradient, ctx.kind)
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2), None, None


def emulate(model: torch.nn.Module, form: str, cast: Round = current_scaling) -> list[str]:
    """Have those linears of a model on one rank that FP8 is for compute as they would in it; their names."""
    kinds = FORMATS[form]
    changed = []
    for name, module in model.named_modules():
        if not name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
            continue

        def forward(x: Tensor, module=module) -> tuple[Tensor, None]:
            return _Linear.apply(x, module.weight, kinds, cast) + module.bias, None

        module.forward = forward
        changed.append(name)
    return changed
