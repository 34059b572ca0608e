"""Random small FLUX models on CUDA against diffusers on the CPU in float64: forward and every gradient."""

import flux_peer
import pytest
import torch
from against_diffusers import errors

from soar_mega.config import ModelConfig
from soar_mega.distributed import device

HEADS_OF_128 = {"num_attention_heads": 2, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """tf32 is off by default; what a process has set before must not decide."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def take_waves_on_our_device(peer):
    """The peer's waves from where ours come from: one rounding of exp is 4e-4 in an angle at a guidance of 7.25."""
    waves = peer.time_text_embed.time_proj
    forward = waves.forward
    waves.forward = lambda steps: forward(steps.to(device())).to(steps.device)


def flux_errors(folder, seed, settings, **changes):
    """Relative errors of the velocity and of the worst parameter's gradient."""
    return errors(flux_peer, folder, seed, settings, take_waves_on_our_device, **changes)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_fp32_equals_diffusers(seed, fused, tmp_path):
    velocity, gradient = flux_errors(tmp_path, seed, ModelConfig(dtype="fp32", fused_kernels=fused))
    # of gradients the divisor may be as small as 1e-3 of the model's largest entry
    assert velocity < 1e-5 and gradient < 1e-4, (velocity, gradient)


@pytest.mark.parametrize(
    ("layers", "backend"), [("local", "sdpa"), ("transformer_engine", "sdpa"), ("transformer_engine", "auto")]
)
@pytest.mark.parametrize("seed", [4, 5])  # with and without guidance
def test_heads_of_128_in_bf16(seed, layers, backend, tmp_path):
    """As wide as a head of FLUX; over torch's layers and, where it is installed, over Transformer Engine's."""
    if layers == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    settings = ModelConfig(dtype="bf16", transformer_impl=layers, attention_backend=backend)
    velocity, gradient = flux_errors(tmp_path, seed, settings, **HEADS_OF_128)
    assert velocity < 0.03 and gradient < 0.15, (velocity, gradient)
