"""The single-process model against diffusers, and what it does with impossible input."""

import pytest
import torch
from peer import (
    SMALL,
    gradient_errors,
    make_inputs,
    make_peer,
    random_case,
    relative_error,
    run_peer,
    save_peer,
    to_peer_names,
)

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers, load_weights
from soar_mega.models.common import specs
from soar_mega.models.common.build import build_model
from soar_mega.models.sd3.embeddings import position_table
from soar_mega.models.sd3.sizes import SD3Sizes


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("seed", range(8))
def test_forward_and_every_gradient_equal_diffusers(seed, tmp_path):
    changes, size, batch, text = random_case(seed)
    peer = save_peer(tmp_path, seed, **changes)
    model = load_diffusers(tmp_path)
    inputs = make_inputs(model.sizes, size, batch, text)
    ours, theirs = model(*inputs), run_peer(peer, inputs)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert relative_error(ours, theirs) < 1e-5
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    errors = gradient_errors(to_peer_names(model.sizes, gradients(model)), gradients(peer))
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_bf16_stays_near_fp32(tmp_path):
    peer = save_peer(tmp_path)
    model = load_diffusers(tmp_path, dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = make_inputs(model.sizes)
    velocity = model(*inputs)
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, run_peer(peer, inputs)) < 0.05


@pytest.mark.parametrize("changes", [{}, {"sample_size": 14, "patch_size": 2, "pos_embed_max_size": 9}])
def test_position_table_equals_diffusers_to_the_bit(changes):
    config = SD3Sizes(**{**SMALL, **changes})
    assert torch.equal(position_table(config, torch.device("cpu")), make_peer(**changes).pos_embed.pos_embed)


@pytest.mark.parametrize(("every", "calls"), [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1])])
def test_recomputation_with_frozen_embedders(every, calls, tmp_path):
    save_peer(tmp_path)
    plain = load_diffusers(tmp_path)
    settings = ModelConfig(dtype="fp32", recompute_granularity="full", recompute_every=every)
    model = build_model(plain.sizes, settings, ParallelConfig())
    load_weights(model, tmp_path)
    inputs = make_inputs(model.sizes)
    plain(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name)
    counted = [0] * 4
    for number, layer in model.layers.items():

        def count(*_, index=int(number)):
            counted[index] += 1

        layer.core_attention.register_forward_pre_hook(count)
    model(*inputs).square().sum().backward()
    # the first attention of a layer with a dual one is called twice in a forward
    dual = [2, 1, 2, 1]
    assert counted == [n * d for n, d in zip(calls, dual)]
    wanted = gradients(plain)
    for name, gradient in gradients(model).items():
        if "embed" in name:
            assert gradient is None
        else:
            assert torch.equal(gradient, wanted[name]), name


def test_selective_recomputation_repeats_attention_alone(tmp_path, monkeypatch):
    save_peer(tmp_path)
    plain = load_diffusers(tmp_path)
    model = build_model(
        plain.sizes, ModelConfig(dtype="fp32", recompute_granularity="selective"), ParallelConfig()
    )
    load_weights(model, tmp_path)
    inputs = make_inputs(model.sizes)
    plain(*inputs).square().sum().backward()
    calls = {"attention": 0, "layer": 0}

    def counted(name, function):
        def call(*arguments, **settings):
            calls[name] += 1
            return function(*arguments, **settings)

        return call

    attend = specs.F.scaled_dot_product_attention
    monkeypatch.setattr(specs.F, "scaled_dot_product_attention", counted("attention", attend))
    for layer in model.layers.values():
        layer.forward = counted("layer", layer.forward)
    with torch.no_grad():
        model(*inputs)
    assert calls == {"attention": 6, "layer": 4}  # two layers are dual
    model(*inputs).square().sum().backward()
    assert calls == {"attention": 6 + 12, "layer": 8}
    wanted = gradients(plain)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(model).items())


def test_frozen_weight_leaves_its_bias_a_gradient(tmp_path):
    save_peer(tmp_path)
    model = load_diffusers(tmp_path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    model(*make_inputs(model.sizes)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if n.endswith("bias") and p.grad is None]
    assert not missing


def test_output_of_frozen_layers_has_a_gradient_for_the_stage_before(tmp_path):
    save_peer(tmp_path)
    model = load_diffusers(tmp_path).requires_grad_(False)
    assert model(*make_inputs(model.sizes)).requires_grad


def test_random_weights_are_keyed_and_start_at_zero_velocity():
    config = SD3Sizes(**SMALL)
    load_diffusers_free = ModelConfig(dtype="fp32", init="random")
    first, same, other = (
        build_model(config, load_diffusers_free, ParallelConfig(), seed=s) for s in (1, 1, 2)
    )
    qkv = "layers.1.image.attention.linear_qkv.weight"
    weights = [dict(model.named_parameters())[qkv] for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(first(*make_inputs(config)), torch.zeros(2, 4, 8, 6))


def test_weights_that_were_never_loaded_show():
    config = SD3Sizes(**SMALL)
    model = build_model(config, ModelConfig(dtype="fp32"), ParallelConfig())
    assert model(*make_inputs(config)).isnan().all()


@pytest.mark.parametrize("size", [(8, 5), (14, 4)])
def test_impossible_latent_size(size, tmp_path):
    save_peer(tmp_path)
    model = load_diffusers(tmp_path)
    with pytest.raises(
        ValueError, match=f"latents of {size[0]} x {size[1]}: .* a multiple of 2 and at most 12"
    ):
        model(*make_inputs(model.sizes, size))


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({}, {"tensor_model_parallel_size": 3}, "does not divide the 4 attention heads.* 1, 2, 4"),
        (
            {},
            {"tensor_model_parallel_size": 2, "context_parallel_size": 4},
            "the 2 attention heads of each tensor-.* 1, 2 with .*=2, and 1, 2, 4 with 1",
        ),
        ({}, {"pipeline_model_parallel_size": 5}, "more than the 4 layers"),
        ({"transformer_impl": "transformer_engine"}, {}, "Transformer Engine, which is not installed"),
        ({"attention_backend": "cudnn"}, {}, "choose one of sdpa, auto, flash, fused, unfused"),
        ({"recompute_granularity": "some"}, {}, "choose none, selective or full"),
        ({"dtype": "fp8"}, {}, "choose one of fp32, bf16"),
    ],
)
def test_impossible_settings(model, parallel, message):
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE and "Transformer Engine" in message:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ValueError, match=message):
        build_model(SD3Sizes(**SMALL), ModelConfig(**model), ParallelConfig(**parallel), meta=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_projection_dim": 30}, "num_attention_heads x attention_head_dim = 32"),
        ({"qk_norm": "layer_norm"}, "rms_norm"),
        ({"attention_head_dim": 1, "num_attention_heads": 6, "caption_projection_dim": 6}, "multiple of 4"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        SD3Sizes(**{**SMALL, **changes})
