"""Bias and GELU against float64, forward and gradients, eager and interpreted."""

import pytest
import torch
from gelu_cases import case, outcome
from guards import assert_close, worst

from soar_mega.kernels.bias_gelu import _checked, bias_gelu
from soar_mega.kernels.tables import LAUNCHES, Launch

# ragged blocks of rows and columns, one program for several rows; one row; no bias
CASES = [((7, 2, 40), True), ((1, 1, 5), True), ((5, 1, 33), False)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """More blocks of columns than one, and fewer programs than rows."""
    monkeypatch.setitem(
        LAUNCHES, "bias_gelu", {name: {"any": Launch(32, 4)} for name in LAUNCHES["bias_gelu"]}
    )
    monkeypatch.setattr("soar_mega.kernels.bias_gelu.PROGRAMS", 6)
    monkeypatch.setattr("soar_mega.kernels.bias_gelu.BACKWARD_ROWS", 3)
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


def test_a_frozen_bias_and_a_gradient_that_lies_otherwise(backend):
    x, bias, gradient = case((7, 2, 40), True)
    (found,) = torch.autograd.grad(bias_gelu(x, bias), x, gradient)
    strided = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    (again,) = torch.autograd.grad(bias_gelu(x, bias.detach()), x, strided)
    assert worst(again, found) < 5e-7


@torch.no_grad()
def test_written_where_the_caller_says(backend):
    x, bias, _ = case((7, 2, 40), True)
    out = torch.full_like(x, torch.nan)
    assert bias_gelu(x, bias, out=out) is out and torch.equal(out, bias_gelu(x, bias))
    with pytest.raises(ValueError, match=r"out must be of shape \[7, 2, 40\]"):
        bias_gelu(x, bias, out=out[:4])


X, BIAS = torch.zeros(4, 2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 4, 8).transpose(0, 1), BIAS, "x must be contiguous"),
        (X.double(), BIAS, "x must be float32 or bfloat16 or float16, not float64"),
        (X[:0], BIAS, "x is empty"),
        (X[0], BIAS, r"x must be of shape \[S, B, F\]"),
        (X, BIAS[:4], r"bias must be of shape \[8\]"),
        (X, BIAS.bfloat16(), "bias must be float32, not bfloat16"),
        (X, BIAS.to("meta"), "bias must be on cpu"),
    ],
)
def test_bad_input_is_named(x, bias, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)
