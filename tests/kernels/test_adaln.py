"""adaLN against float64, forward and every gradient, eager and interpreted."""

import pytest
import torch
from adaln_cases import case, exact, outcome, upstream
from guards import assert_close, canaries, guarded, worst

from soar_mega.kernels.adaln import _checked, adaln, plain_adaln

# tokens, samples, hidden size: a ragged block of tokens and a width that is no power of two; a whole one, batch 1
SHAPES = [(19, 3, 40), (1, 2, 7), (5, 1, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_branch_matches_float64(backend, shape):
    for name, (mine, theirs) in outcome(shape, torch.float32).items():
        assert_close(mine, theirs, name)


@pytest.fixture
def two_programs(monkeypatch):
    """Of a backward pass, at most."""
    monkeypatch.setattr("soar_mega.kernels.adaln.PROGRAMS", 2)
    _checked.known.clear()
    yield
    _checked.known.clear()


def test_fewer_programs_than_samples(interpreted, two_programs):
    for name, (mine, theirs) in outcome(SHAPES[0], torch.float32).items():
        assert_close(mine, theirs, name)


@pytest.mark.parametrize("shape", SHAPES[::2])
def test_bf16_matches_float64(interpreted, shape):
    for name, (mine, theirs) in outcome(shape, torch.bfloat16).items():
        assert_close(mine, theirs, name)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_without_a_branch_matches_float64(backend, shape):
    (residual, _), (shift, scale, _) = case(shape)
    inputs, gradients = [residual, shift, scale], upstream(shape, torch.float32)
    with canaries():
        hidden, modulated = adaln(*inputs)
        found = torch.autograd.grad([hidden, modulated], inputs, [guarded(g) for g in gradients])
    assert hidden.data_ptr() == residual.data_ptr()
    reference = exact(inputs)
    wanted = plain_adaln(*reference)
    assert worst(modulated, wanted[1]) < 5e-7
    wanted_gradients = torch.autograd.grad(
        [wanted[0] * 1, wanted[1]], reference, [g.double() for g in gradients]
    )
    for mine, theirs in zip(found, wanted_gradients):
        assert worst(mine, theirs) < 5e-7


@torch.no_grad()
def test_modulated_again_of_the_sum_that_is_kept(backend):
    (residual, branch), (shift, scale, gate) = case(SHAPES[0], torch.bfloat16)
    hidden, modulated = adaln(residual, shift, scale, branch, gate)
    out = torch.full_like(modulated, torch.nan)
    again, written = adaln(hidden, shift, scale, out=out)
    assert again is hidden and written is out and torch.equal(out, modulated)
    with pytest.raises(ValueError, match="out must be bfloat16, not float32"):
        adaln(hidden, shift, scale, out=out.float())


@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_nobody_reads(backend, which):
    (residual, branch), (shift, scale, gate) = case((5, 1, 64))
    inputs = [residual, shift, scale, branch, gate]
    found = torch.autograd.grad(adaln(*inputs)[which].sum(), inputs, allow_unused=True)
    reference = exact(inputs)
    wanted = torch.autograd.grad(plain_adaln(*reference)[which].sum(), reference, allow_unused=True)
    for mine, theirs in zip(found, wanted):
        mine = torch.zeros(1) if mine is None else mine
        theirs = torch.zeros(1) if theirs is None else theirs
        assert (mine.double() - theirs).abs().amax() < 5e-6


def test_the_eager_twin_is_the_plain_code_to_the_bit():
    (residual, branch), (shift, scale, gate) = case((19, 3, 40), torch.bfloat16)
    inputs, gradients = [residual, shift, scale, branch, gate], upstream((19, 3, 40), torch.bfloat16)
    results = []
    for function in (adaln, plain_adaln):
        outputs = function(*inputs)
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, gradients)])
    for mine, theirs in zip(*results):
        assert torch.equal(mine, theirs)


def bad_inputs():
    tokens = torch.zeros(4, 2, 8)
    vector = torch.zeros(2, 8)
    good = {"residual": tokens, "shift": vector, "scale": vector, "branch": tokens, "gate": vector}
    return [
        (good, {"residual": torch.zeros(2, 4, 8).transpose(0, 1)}, "residual must be contiguous"),
        (good, {"residual": tokens.double()}, "residual must be float32 or bfloat16 or float16, not float64"),
        (good, {"residual": tokens[:0]}, "residual is empty"),
        (good, {"branch": tokens.bfloat16()}, "branch must be float32, not bfloat16"),
        (good, {"branch": torch.zeros(4, 2, 9)}, r"branch must be of shape \[4, 2, 8\], not \[4, 2, 9\]"),
        (good, {"branch": None}, "branch and gate go together"),
        (
            good,
            {"branch": None, "gate": None, "bias": vector[0]},
            "bias is of a branch: give branch and gate too",
        ),
        (good, {"bias": torch.zeros(9)}, r"bias must be of shape \[8\]"),
        (good, {"gate": None}, "branch and gate go together"),
        (good, {"gate": torch.zeros(3, 8)}, r"gate must be of shape \[2, 8\]"),
        (good, {"shift": torch.zeros(8, 2).T}, "shift must be contiguous along its last dimension"),
        (good, {"scale": vector.to("meta")}, "scale must be on cpu"),
    ]


@pytest.mark.parametrize(("good", "change", "message"), bad_inputs())
def test_bad_input_is_named(good, change, message):
    with pytest.raises(ValueError, match=message):
        adaln(**{**good, **change})
