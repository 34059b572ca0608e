"""The kernels of a layer on CUDA: float64, rounding to nearest, equal bits of two runs; gradients in main_grad."""

import adaln_cases
import gated_cases
import gelu_cases
import pytest
import qk_cases
import torch
from guards import assert_close

from soar_mega.kernels.adaln import adaln
from soar_mega.models.common.linear import linear

ADALN = [(19, 3, 40), (1, 2, 7), (5, 1, 64), (77, 2, 1536), (33, 1, 2432), (64, 2, 3072)]
QK = [
    ((((7, 0), (3, 2)), 2, 3, 16), qk_cases.ALL),
    ((((5, 3),), 3, 1, 12), ("norm", "rotary")),
    ((((256, 0), (77, 3)), 2, 24, 64), ("bias", "norm")),
    ((((80, 0),), 2, 38, 64), ()),
    ((((64, 0), (16, 0)), 2, 24, 128), qk_cases.ALL),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ADALN)
def test_adaln_matches_float64(shape, dtype):
    for name, (found, exact) in adaln_cases.outcome(shape, dtype, "cuda").items():
        assert_close(found, exact, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "has"), QK)
def test_qk_norm_rope_matches_float64(shape, has, dtype):
    for name, (found, exact) in qk_cases.outcome(shape, has, dtype, "cuda").items():
        assert_close(found, exact, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 2, 40), (1, 1, 5), (77, 2, 6144)])
@pytest.mark.parametrize("cases", [gelu_cases, gated_cases])
def test_behind_the_linears_of_an_mlp(cases, shape, dtype):
    for with_bias in (True, False):
        for name, (found, exact) in cases.outcome(shape, with_bias, dtype, "cuda").items():
            assert_close(found, exact, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_are_added_up_in_float32(dtype):
    """Over several micro-batches: each product is added to main_grad without being rounded to bf16 first."""
    weight, bias, *x = (
        torch.randn(size, device="cuda").to(dtype).requires_grad_()
        for size in ((96, 64), (96,), *[(33, 2, 64)] * 3)
    )
    weight.main_grad = torch.zeros(96, 64, device="cuda")
    wanted = torch.zeros(96, 64, device="cuda", dtype=torch.float64)
    for part in x:
        gradient = torch.randn(33, 2, 96, device="cuda").to(dtype)
        linear(part, weight, bias).backward(gradient)
        wanted += gradient.double().flatten(0, 1).t() @ part.detach().double().flatten(0, 1)
        assert weight.grad_added_to_main_grad
    error = (weight.main_grad - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5, f"{error:.2e}"


def test_two_runs_give_equal_bits():
    def runs(outcome, *case):
        first, second = (outcome(*case, torch.bfloat16, "cuda") for _ in range(2))
        return [(first[name][0], second[name][0]) for name in first]

    pairs = [*runs(adaln_cases.outcome, ADALN[3]), *runs(qk_cases.outcome, *QK[4])]
    assert all(torch.equal(*pair) for pair in pairs)


def test_tokens_beyond_two_to_the_31_elements():
    """The last token of a stream of more than 2^31 elements, where the device has the memory."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    residual = torch.zeros(2**31 // 2048 + 2, 1, 2048, dtype=torch.bfloat16, device="cuda")
    residual[-1, :, ::2] = 3.0
    vector = torch.zeros(1, 2048, dtype=torch.bfloat16, device="cuda")
    _, modulated = adaln(residual, vector, vector)
    expected = torch.tensor([1.0, -1.0], device="cuda", dtype=torch.bfloat16).repeat(1024)
    assert torch.equal(modulated[-1, 0], expected) and not bool(modulated[-2].any())
