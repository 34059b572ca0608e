"""Streams are padded to FP8's tile wherever model.fp8 is set; what is computed stays the same."""

import pytest
import torch
from peer import gradient_errors, make_inputs, relative_error, save_peer

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers
from soar_mega.models.common.build import transformer_config
from soar_mega.models.common.sequence_shards import padded_length
from soar_mega.models.sd3.presets import PRESETS


def padded(length, recipe="tensorwise", **layout):
    model = ModelConfig(transformer_impl="transformer_engine", fp8="hybrid", fp8_recipe=recipe)
    config = transformer_config(PRESETS["sd35_medium"], model, ParallelConfig(**layout))
    return padded_length(length, config)


@pytest.mark.parametrize(
    ("recipe", "layout", "wanted"),
    [
        ("tensorwise", {}, 336),
        ("delayed", {"tensor_model_parallel_size": 2}, 336),
        ("blockwise", {}, 336),
        ("mxfp8", {}, 352),
        ("tensorwise", {"context_parallel_size": 3}, 336),
        # each rank casts its own part before it is gathered
        ("tensorwise", {"context_parallel_size": 2}, 352),
        ("tensorwise", {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 384),
        ("mxfp8", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 384),
        ("blockwise", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 512),
        ("tensorwise", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 3}, 384),
    ],
)  # fmt: skip
def test_lengths_in_fp8(recipe, layout, wanted):
    assert padded(333, recipe, **layout) == wanted


def run(model, inputs):
    velocity = model(*inputs)
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    (velocity * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return velocity.detach(), gradients


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_a_padded_model_computes_the_same(recipe, tmp_path):
    """On one rank; 7 text and 12 image tokens of 3 samples, as without Transformer Engine FP8 itself does nothing."""
    save_peer(tmp_path)
    model = load_diffusers(tmp_path)
    inputs = make_inputs(model.sizes, (8, 6), 3, 7)
    velocity, gradients = run(model, inputs)
    seen = []
    model.layers["0"].register_forward_pre_hook(
        lambda layer, inputs: seen.append([len(x) for x in inputs[:2]])
    )
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    padded_velocity, padded_gradients = run(model, inputs)
    tile = 16 if recipe == "tensorwise" else 32
    assert seen == [[tile, tile]]
    assert relative_error(padded_velocity, velocity) < 1e-5
    assert max(gradient_errors(padded_gradients, gradients).values()) < 1e-5
