"""Dao's flash-attn: which of them a GPU takes, and our way to it, over stand-ins for its operators."""

import sys
from types import SimpleNamespace

import flash_stand_in
import pytest
import te_stand_in
import torch
import torch.nn.functional as F
from peer import make_inputs
from test_fp8 import FP8, SIZES

from soar_mega import layer_checks
from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.models.common.build import build_model
from soar_mega.models.common.flash_attention import FlashAttention
from soar_mega.models.common.specs import ScaledDotProductAttention

FLASH = {"init": "random", "dtype": "bf16", "attention_backend": "flash"}


def build(**settings):
    start_world(ParallelConfig())
    return build_model(SIZES, ModelConfig(**FLASH | settings), ParallelConfig())


@pytest.mark.parametrize(
    ("capability", "installed", "version"),
    [
        ((9, 0), {"flash_attn", "flash_attn_3"}, 3),
        ((9, 0), {"flash_attn"}, 2),
        ((10, 0), {"flash_attn", "flash_attn_3"}, 2),
        ((8, 0), {"flash_attn_3"}, None),
        ((7, 5), {"flash_attn"}, None),
        ((9, 0), set(), None),
    ],
)
def test_flash_attention_by_gpu(capability, installed, version, monkeypatch):
    monkeypatch.setattr(layer_checks, "find_spec", lambda name: name if name in installed else None)
    assert layer_checks.flash_version(capability) == version


def test_flash_attention_2_is_attention(monkeypatch):
    def attend(*heads, deterministic):
        assert not deterministic
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads)).transpose(1, 2)

    te_stand_in.install(monkeypatch)
    monkeypatch.setattr(layer_checks, "find_spec", lambda name: name if name == "flash_attn" else None)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=attend))
    attention, qkv = build().layers["0"].core_attention, torch.randn(3, 7, 2, 4, 8)
    assert isinstance(attention, FlashAttention)
    assert torch.allclose(attention(*qkv), ScaledDotProductAttention()(*qkv), atol=1e-6)


@pytest.mark.parametrize(
    "layers", [{}, FP8, {"recompute_granularity": "selective"}], ids=["local", "FP8", "selective"]
)
def test_flash_attention_3_is_attention(layers, monkeypatch):
    """Over both kinds of layers: the context and the gradients lie as the queries do, whichever way those lie."""
    te_stand_in.install(monkeypatch)
    operators = flash_stand_in.install(monkeypatch)
    attention = build(**layers).layers["0"].core_attention
    assert isinstance(attention, FlashAttention)
    heads = [torch.randn(7, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    context, expected = attention(*heads), ScaledDotProductAttention()(*heads)
    torch.testing.assert_close(context, expected)
    assert context.is_contiguous()
    weights = torch.randn_like(context)
    found = torch.autograd.grad((context * weights).sum(), heads)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), heads))
    assert all(gradient.is_contiguous() for gradient in found) and operators.deterministic == [False]
    try:
        torch.use_deterministic_algorithms(True)
        attention(*heads).sum().backward()  # whose gradient is one number, expanded
    finally:
        torch.use_deterministic_algorithms(False)
    assert operators.deterministic == [False, True]


def test_a_model_trains_through_flash_attention_3(monkeypatch):
    te_stand_in.install(monkeypatch)
    found = []
    for backend in ("flash", "sdpa"):
        if backend == "flash":
            operators = flash_stand_in.install(monkeypatch)
        torch.manual_seed(0)
        model = build(attention_backend=backend)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        model(*make_inputs(SIZES, (8, 6), 3, 5)).square().sum().backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert len(operators.deterministic) == 5  # four layers, one of them with a second attention
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_heads_that_it_was_not_compiled_for_are_refused(monkeypatch):
    te_stand_in.install(monkeypatch)
    flash_stand_in.install(monkeypatch, head_sizes=(64, 96))
    assert layer_checks.flash_3_head_sizes() == [64, 96]
    build()  # heads of 8
    sizes = SIZES.__class__(**vars(SIZES) | {"attention_head_dim": 104, "caption_projection_dim": 416})
    with pytest.raises(ValueError, match="heads of up to 96, and this model's have 104"):
        build_model(sizes, ModelConfig(**FLASH), ParallelConfig())
