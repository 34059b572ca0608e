"""The operations whose kernels are measured, at the shapes of SD3.5 and FLUX: by kernel, and by plain torch calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from soar_mega.kernels import correction_loss, rollout_renoise
from soar_mega.kernels.adaln import adaln, plain_adaln
from soar_mega.kernels.bias_gelu import bias_gelu, plain_bias_gelu
from soar_mega.kernels.gated_add import gated_add, plain_gated_add
from soar_mega.kernels.qk_norm_rope import Projected, plain_qk_norm_rope, qk_norm_rope

POINTS = 16  # of a forward of the model, as in tools/compare_baseline.py; recipes/sd35_medium takes 14
LATENTS = {"512 px": (16, 64, 64), "1024 px": (16, 128, 128)}  # the VAEs of SD3.5 and FLUX have 16 channels


@dataclass(frozen=True)
class Case:
    """One operation at one shape, with inputs of its own: fused and eager do the same work."""

    fused: Callable[[], object]
    eager: Callable[[], object]


def states_case(shape: tuple[int, int, int], points: int, device: torch.device) -> Case:
    """States of B = 4 samples with so many points each; noise given, so that all forms read the same."""
    sources, rows = soar_inputs(shape, points, device)
    z0, z1, v_uncond, v_cond = sources

    def fused() -> Tensor:
        return rollout_renoise(z0, z1, v_uncond, v_cond, rows, dtype=torch.bfloat16)

    on_device = rows.to(device)

    def eager() -> Tensor:
        return plain(sources, on_device).bfloat16()

    return Case(fused, eager)


def loss_case(shape: tuple[int, int, int], points: int, device: torch.device) -> Case:
    """Losses of the same, and the gradient of the velocity."""
    sources, rows = soar_inputs(shape, points, device)
    z0, z1, v_uncond, v_cond = sources
    velocity = torch.randn(4, points, *shape, device=device, requires_grad=True)
    upstream = torch.ones(4, points, device=device)

    def gradient(losses: Tensor) -> Tensor:
        return torch.autograd.grad(losses, velocity, upstream)[0]

    def fused() -> Tensor:
        return gradient(correction_loss(velocity, z0, z1, v_uncond, v_cond, rows))

    on_device = rows.to(device)

    def eager() -> Tensor:
        return gradient((velocity - plain(sources, on_device)).square().flatten(2).mean(dim=2))

    return Case(fused, eager)


def soar_inputs(
    shape: tuple[int, int, int], points: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Four sources, and rows that read them."""
    rows = torch.randn(4, points, 6, dtype=torch.float64)
    rows[..., 4:] = 0
    return [torch.randn(4, *shape, device=device) for _ in range(4)], rows


def plain(sources: list[Tensor], rows: Tensor) -> Tensor:
    """Rows [B, N, 6] over four sources by plain calls: what torch.compile gets to fuse."""
    z0, *others = (source[:, None] for source in sources)
    first, *factors = (column[..., None, None, None].float() for column in rows.unbind(-1)[:4])
    total = first * z0
    for factor, source in zip(factors, others, strict=True):
        total = torch.addcmul(total, factor, source)
    return total


def adaln_case(tokens: int, width: int, backward: bool, device: torch.device) -> Case:
    """A gated site."""
    residual, branch = leaves(2, device, tokens, POINTS, width)
    shift, scale, gate = leaves(3, device, POINTS, width)
    [bias] = leaves(1, device, width)
    arguments = (residual, shift, scale, branch, gate, bias)
    return case_of_forms([partial(form, *arguments) for form in (adaln, plain_adaln)], arguments, backward)


def qk_case(text: int, heads: int, width: int, rotary: bool, backward: bool, device: torch.device) -> Case:
    """1024 image tokens and the text of a joint attention, with the bias of the linear before."""
    features = 3 * heads * width
    inputs: list[Tensor] = []
    streams = []
    for tokens in (1024, text):
        made = [
            *leaves(1, device, tokens, POINTS, features),
            *leaves(1, device, features),
            *leaves(2, device, width),
        ]
        streams.append(Projected(made[0], tokens, *made[1:]))
        inputs += made
    cosine, sine = (torch.randn(1024 + text, width, device=device) if rotary else None for _ in range(2))
    forms = [partial(form, streams, width, cosine, sine) for form in (qk_norm_rope, plain_qk_norm_rope)]
    return case_of_forms(forms, inputs, backward)


def mlp_case(
    forms: Sequence[Callable[..., Tensor]],
    shapes: Sequence[tuple[int, ...]],
    backward: bool,
    device: torch.device,
) -> Case:
    """One form and another of what lies behind a linear, of arguments of these shapes."""
    arguments = [tensor for shape in shapes for tensor in leaves(1, device, *shape)]
    return case_of_forms([partial(in_a_tuple, form, arguments) for form in forms], arguments, backward)


def in_a_tuple(operation: Callable[..., Tensor], arguments: Sequence[Tensor]) -> tuple[Tensor]:
    return (operation(*arguments),)


def leaves(count: int, device: torch.device, *shape: int) -> list[Tensor]:
    """bfloat16 tensors that get gradients."""
    return [torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(count)]


def case_of_forms(
    forms: Sequence[Callable[[], tuple[Tensor, ...]]], inputs: Sequence[Tensor], backward: bool
) -> Case:
    return Case(*(both(form, inputs) if backward else form for form in forms))


def both(
    call: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """What `call` computes from `inputs`, and their gradients with ones from above, which are made here."""
    with torch.no_grad():
        upstream = [torch.ones_like(output) for output in call()]
    return lambda: torch.autograd.grad(call(), inputs, upstream)


def all_cases() -> dict[str, Callable[[torch.device], Case]]:
    """By name, how each is made: 512 and 1024 px of the SOAR kernels, and the sites of each model at 512 px."""
    cases: dict[str, Callable[[torch.device], Case]] = {}
    for label, shape in LATENTS.items():
        for points in (1, 6):
            cases[f"rollout_renoise {label} N={points}"] = partial(states_case, shape, points)
            cases[f"correction_loss {label} N={points}"] = partial(loss_case, shape, points)
    for model, heads, width, text in (
        ("SD3.5-M", 24, 64, 333),
        ("SD3.5-L", 38, 64, 333),
        ("FLUX", 24, 128, 512),
    ):
        for part in ("forward", "both"):
            backward, rotary = part == "both", model == "FLUX"
            cases[f"adaln {model} {part}"] = partial(adaln_case, 1024 + text, heads * width, backward)
            cases[f"qk_norm_rope {model} {part}"] = partial(qk_case, text, heads, width, rotary, backward)
            hidden, image = heads * width, (1024, POINTS)  # tokens at 512 px
            wide = ((*image, 4 * hidden), (4 * hidden,))
            joined = ((*image, hidden), (*image, hidden), (POINTS, hidden), (hidden,))
            gelu, add = (bias_gelu, plain_bias_gelu), (gated_add, plain_gated_add)
            cases[f"bias_gelu {model} {part}"] = partial(mlp_case, gelu, wide, backward)
            cases[f"gated_add {model} {part}"] = partial(mlp_case, add, joined, backward)
    return cases
