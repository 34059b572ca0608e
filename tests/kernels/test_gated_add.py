"""A gated branch with its bias joins the residual: against float64, forward and gradients, eager and interpreted."""

import pytest
import torch
from gated_cases import case, outcome
from guards import assert_close, worst

from soar_mega.kernels.gated_add import _checked, gated_add
from soar_mega.kernels.tables import LAUNCHES, Launch

# ragged blocks of tokens and columns; one of each; no bias
CASES = [((7, 2, 40), True), ((1, 1, 5), True), ((5, 3, 33), False)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """More blocks of tokens and of columns than one."""
    monkeypatch.setitem(
        LAUNCHES, "gated_add", {name: {"any": Launch(32, 4)} for name in LAUNCHES["gated_add"]}
    )
    monkeypatch.setattr("soar_mega.kernels.gated_add.BACKWARD_TOKENS", 3)
    _checked.known.clear()
    yield
    _checked.known.clear()


@pytest.mark.parametrize(("shape", "with_bias"), CASES)
def test_matches_float64(backend, shape, with_bias):
    for name, (mine, theirs) in outcome(shape, with_bias, torch.float32).items():
        assert_close(mine, theirs, name)


@pytest.mark.parametrize(("shape", "with_bias"), CASES[:1])
def test_bf16_matches_float64(interpreted, shape, with_bias):
    for name, (mine, theirs) in outcome(shape, with_bias, torch.bfloat16).items():
        assert_close(mine, theirs, name)


def test_a_gradient_may_lie_otherwise_in_memory(backend):
    inputs, gradient = case((7, 2, 40), True)
    found = torch.autograd.grad(gated_add(*inputs), inputs, gradient)
    strided = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    for mine, theirs in zip(torch.autograd.grad(gated_add(*inputs), inputs, strided), found):
        assert worst(mine, theirs) < 5e-7


TOKENS, VECTORS = torch.zeros(4, 2, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 4, 8).transpose(0, 1)}, "residual must be contiguous"),
        ({"residual": TOKENS.double()}, "residual must be float32 or bfloat16 or float16, not float64"),
        ({"branch": TOKENS[:2]}, r"branch must be of shape \[4, 2, 8\]"),
        ({"branch": TOKENS.bfloat16()}, "branch must be float32, not bfloat16"),
        ({"gate": torch.zeros(8, 2).T}, "gate must be contiguous along its last dimension"),
        ({"gate": VECTORS[:1]}, r"gate must be of shape \[2, 8\]"),
        ({"bias": torch.zeros(4)}, r"bias must be of shape \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, "bias must be on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"residual": TOKENS, "branch": TOKENS, "gate": VECTORS, "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        gated_add(**{**good, **change})
