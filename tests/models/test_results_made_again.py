"""Results of a layer that are not kept for its backward: given back, made again, and the same to the last bit."""

import pytest
import torch
from live_bytes import LiveBytes
from peer import make_inputs

from soar_mega.config import LoraConfig, ModelConfig, ParallelConfig
from soar_mega.layer_checks import RECOMPUTE_MODULES, check_layers
from soar_mega.models.common import recompute
from soar_mega.models.common.build import build_model
from soar_mega.models.common.lora import add_adapters
from soar_mega.models.common.recompute import free_until_backward
from soar_mega.models.flux.sizes import FluxSizes
from soar_mega.models.sd3.sizes import SD3Sizes

SD3 = SD3Sizes(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=8,
    sample_size=8,
    dual_attention_layers=(0,),
)
FLUX = FluxSizes(
    in_channels=4,
    num_double_layers=2,
    num_single_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(2, 4, 2),
)


def selective(*modules, **settings):
    chosen = {"recompute_granularity": "selective", "recompute_modules": list(modules)} if modules else {}
    return ModelConfig(init="random", **chosen, **settings)


class Doubled:
    """Twice a tensor, as a layer's parts are made: anew, or where the caller says."""

    def __init__(self, x):
        self.x, self.calls = x, 0

    def __call__(self, out=None):
        self.calls += 1
        return 2 * self.x if out is None else torch.mul(self.x, 2, out=out)


def test_memory_is_given_back_until_the_backward_needs_it():
    x = torch.arange(1000.0, requires_grad=True)
    make = Doubled(x)
    with LiveBytes() as counted:
        doubled = make()
        first, second = doubled.square(), doubled.pow(3)
        with_it = counted.now
        free_until_backward(doubled, make, first, second)
        assert counted.now == with_it - 4000
        (first + second).sum().backward()
        assert make.calls == 2  # for both readers
    assert torch.equal(x.grad, 2 * (4 * x + 3 * (2 * x) ** 2).detach())


def test_nothing_holds_it_when_the_readers_are_done():
    x = torch.ones(1000, requires_grad=True)
    make = Doubled(x)
    with LiveBytes() as counted:
        doubled = make()
        squared = doubled.square()
        free_until_backward(doubled, make, squared)
        del doubled
        end = 3 * squared
        torch.autograd.grad(end.sum(), x)
        assert counted.now == end.nbytes + squared.nbytes


def test_without_a_backward_it_stays():
    make = Doubled(torch.ones(3))
    doubled = make()
    free_until_backward(doubled, make, doubled.square())
    assert make.calls == 1 and doubled.tolist() == [2, 2, 2]


@pytest.mark.parametrize("sizes", [SD3, FLUX], ids=["sd3", "flux"])
@pytest.mark.parametrize("form", ["kernels", "plain", "bf16"])
def test_gradients_are_those_without(sizes, form, monkeypatch):
    if form == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = {"dtype": "bf16" if form == "bf16" else "fp32", "fused_kernels": form != "plain"}
    inputs = make_inputs(sizes, (4, 4), batch=2, text=5)
    found = []
    for modules in [(), RECOMPUTE_MODULES, *([name] for name in RECOMPUTE_MODULES if form == "plain")]:
        model = build_model(sizes, selective(*modules, **settings), ParallelConfig())
        torch.manual_seed(3)
        for parameter in model.parameters():  # a new model's modulation is zero, and so are most gradients
            torch.nn.init.normal_(parameter, std=0.3)
        velocity = model(*inputs)
        velocity.square().sum().backward()
        found.append((velocity, {name: p.grad for name, p in model.named_parameters()}))
    (velocity, wanted), *others = found
    assert all(gradient.any() for gradient in wanted.values())
    for again, ours in others:
        assert torch.equal(again, velocity) and ours.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []


@pytest.mark.parametrize("sizes", [SD3, FLUX], ids=["sd3", "flux"])
def test_what_no_trained_linear_reads_is_not_made_again(monkeypatch, sizes):
    """Adapters on joint attention alone: other linears are frozen, and keep nothing that could be given back."""
    restored = []
    restore = recompute._Freed.restore
    monkeypatch.setattr(recompute._Freed, "restore", lambda freed: restored.append(1) or restore(freed))
    inputs = make_inputs(sizes, (4, 4), batch=2, text=5)
    for modules, expected in [("mlp_act", 0), ("layernorm", 6)]:
        model = build_model(sizes, selective(modules, dtype="fp32", fused_kernels=False), ParallelConfig())
        model.requires_grad_(False)
        add_adapters([model], LoraConfig(rank=2), 1)
        for parameter in model.parameters():  # or no gradient comes through a new model's gates
            torch.nn.init.normal_(parameter, std=0.3)
        model(*inputs).square().sum().backward()
        assert len(restored) == expected
        restored.clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            selective("layer_norm"),
            "'layer_norm' is unknown: choose from core_attn, layernorm, mlp_act, qk_layernorm",
        ),
        (
            ModelConfig(recompute_granularity="selective", recompute_modules=[]),
            "selective needs model.recompute_modules",
        ),
        (ModelConfig(recompute_modules=["mlp_act"]), "set it to selective, or model.recompute_modules="),
        (
            selective("mlp_act", "qk_layernorm", fp8="hybrid", transformer_impl="transformer_engine"),
            "nothing is saved by mlp_act: leave it out",
        ),
    ],
)
def test_what_cannot_be_chosen(settings, message):
    with pytest.raises(ValueError, match=message):
        check_layers(settings)
