"""Attention by torch and by flash-attn, at the sizes of SD3.5's and FLUX's heads, against float64."""

from types import SimpleNamespace

import pytest
import torch
from te_cases import distance, skip_what_is_not_installed

from soar_mega.config import ModelConfig
from soar_mega.models.common.specs import ATTENTIONS

TOKENS, SAMPLES, HEADS = 1178, 2, 3  # 1024 of an image of 512 px, and 154 of text


def built(backend, head_size):
    skip_what_is_not_installed(ModelConfig(dtype="bf16", attention_backend=backend), head_size)
    return ATTENTIONS[backend](config=SimpleNamespace(kv_channels=head_size))


def heads(head_size):
    """Queries, keys and values [S, B, heads, D], and what the context is multiplied by."""
    generator = torch.Generator("cuda").manual_seed(head_size)
    shape = (TOKENS, SAMPLES, HEADS, head_size)
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(4)]


def exact(query, key, value):
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


def results(attention, tensors):
    """The context, and the gradients of queries, keys and values."""
    *qkv, weights = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    context = attention(*qkv)
    return context, *torch.autograd.grad(context, qkv, weights.flatten(2))


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("backend", ATTENTIONS)
def test_equals_float64(backend, head_size):
    tensors = heads(head_size)
    expected = results(exact, [x.double() for x in tensors])
    found = results(built(backend, head_size), tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours.double(), theirs) < 0.01  # weights and results are rounded to bf16, 2^-9 at most
    # then neither the linears behind it nor the kernel before it make a copy
    assert backend == "sdpa" or all(x.is_contiguous() for x in found)


@pytest.mark.parametrize("head_size", [64, 128])
def test_asked_for_the_same_bits_flash_attention_gives_them(head_size):
    attention, tensors = built("flash", head_size), heads(head_size)
    try:
        torch.use_deterministic_algorithms(True)
        first, *others = [results(attention, tensors) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
