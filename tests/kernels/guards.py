"""Inputs that lie between NaNs and outputs that lie between canaries: a kernel that strays is caught.

The interpreter reads and writes past the end of a tensor without a word.
"""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from soar_mega.kernels.dispatch import interpreted

PAD = 2048  # elements on either side: more than a block, and a multiple of 16
CANARY = -12345.0  # exact in bfloat16 after rounding, and no value of a test


def guarded(tensor: Tensor) -> Tensor:
    """The same tensor, contiguous, in the middle of a buffer of NaNs."""
    buffer = torch.full((tensor.numel() + 2 * PAD,), math.nan, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[PAD : PAD + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def canaries() -> Iterator[None]:
    """The outputs of a launch, made by torch.empty, lie in canaries, which must be there at the end, and are filled."""
    made: list[tuple[Tensor, Tensor]] = []
    empty = torch.empty

    def guarded_empty(*size: object, **options: object) -> Tensor:
        like = empty(*size, **options)
        if not like.is_floating_point():
            return like
        buffer = empty(like.numel() + 2 * PAD, dtype=like.dtype, device=like.device).fill_(CANARY)
        inside = buffer[PAD : PAD + like.numel()].view(like.shape)
        made.append((buffer, inside))
        return inside

    with mock.patch.object(torch, "empty", guarded_empty):
        yield
    assert made or not interpreted(), "nothing was allocated by torch.empty: the canaries guard nothing"
    for buffer, inside in made:
        canary = torch.tensor(CANARY, dtype=buffer.dtype, device=buffer.device)
        assert bool((buffer[:PAD] == canary).all() and (buffer[-PAD:] == canary).all()), (
            "written outside an output"
        )
        assert not bool((inside == canary).any()), "part of an output was never written"


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry; NaN anywhere is infinitely wrong."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not bool(found.isfinite().all()):
        return math.inf
    return float((found.double() - expected.double()).abs().amax() / expected.double().abs().amax())


def assert_close(found: Tensor, exact: Tensor, name: str = "") -> None:
    """What a kernel stored is `exact` (float64), computed in float32 and rounded to nearest once.

    A float32 entry is off by 1e-6 of the largest entry at most, a bfloat16 entry by half of its own last digit more.
    The interpreter cuts bfloat16 off instead of rounding it: a whole digit.
    """
    assert found.dtype in (torch.float32, torch.bfloat16) and exact.dtype == torch.float64
    assert found.shape == exact.shape, (name, found.shape, exact.shape)
    error, allowed = (found.detach().double() - exact).abs(), 1e-6 * exact.abs().amax()
    if found.dtype == torch.bfloat16:
        # an entry in [2^(e - 1), 2^e) has 8 binary digits: the last one is 2^(e - 8)
        last_digit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)
        allowed = 2 * allowed + last_digit * (1.0 if interpreted() else 0.5)
    excess = float((error - allowed).amax())  # NaN where anything is
    assert excess <= 0.0, f"{name}: off by {float(error.amax()):.3g}, {excess:.3g} more than allowed"
