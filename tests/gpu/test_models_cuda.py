"""Random small models on CUDA against diffusers on the CPU in float64: forward and every gradient."""

import peer
import pytest
import torch
from against_diffusers import errors

from soar_mega.config import ModelConfig

WIDE = {"num_attention_heads": 4, "attention_head_dim": 64, "caption_projection_dim": 256}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """tf32 is off by default; what a process has set before must not decide."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_fp32_equals_diffusers(seed, fused, tmp_path):
    velocity, gradient = errors(peer, tmp_path, seed, ModelConfig(dtype="fp32", fused_kernels=fused))
    # of gradients the divisor may be as small as 1e-3 of the model's largest entry
    assert velocity < 1e-5 and gradient < 1e-4, (velocity, gradient)


@pytest.mark.parametrize("seed", range(6))
def test_bf16_stays_near_diffusers(seed, tmp_path):
    velocity, gradient = errors(peer, tmp_path, seed, ModelConfig(dtype="bf16"))
    assert velocity < 0.03 and gradient < 0.15, (velocity, gradient)


@pytest.mark.parametrize(
    ("layers", "backend"), [("local", "sdpa"), ("transformer_engine", "sdpa"), ("transformer_engine", "auto")]
)
@pytest.mark.parametrize("seed", [6, 7])  # with and without QK norm
def test_heads_of_64_in_bf16(seed, layers, backend, tmp_path):
    """As wide as an SD3.5 head; over torch's layers and, where it is installed, over Transformer Engine's."""
    if layers == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    settings = ModelConfig(dtype="bf16", transformer_impl=layers, attention_backend=backend)
    velocity, gradient = errors(peer, tmp_path, seed, settings, **WIDE)
    assert velocity < 0.03 and gradient < 0.15, (velocity, gradient)
