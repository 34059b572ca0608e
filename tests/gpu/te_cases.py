"""Small models over torch's and Transformer Engine's layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peer import make_inputs, save_peer
from torch import Tensor

from soar_mega import layer_checks
from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_weights
from soar_mega.distributed import device, start_world
from soar_mega.models.common.build import build_model
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import read_sizes

WIDE: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "caption_projection_dim": 256,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 12,
}
SIZE, BATCH, TEXT = (16, 12), 3, 77  # 3 x 77 text and 3 x 48 image tokens

Gradients = dict[str, Tensor]


def skip_what_is_not_installed(model: ModelConfig, head_size: int) -> None:
    """Also where flash-attn 3 was compiled without heads of this size."""
    if (reason := layer_checks.why_not(model)) is not None:
        pytest.skip(reason)
    if model.attention_backend == "flash" and head_size > max(layer_checks.flash_3_head_sizes()):
        pytest.skip(f"flash-attn 3 was compiled without heads of {head_size}")


def build(folder: Path, **settings: Any) -> Transformer:
    """The same weights over other layers: bf16 where `settings` of the model do not say otherwise."""
    if not (folder / "transformer").exists():
        save_peer(folder, **WIDE)
    start_world(ParallelConfig())
    model = build_model(read_sizes(folder), ModelConfig(**({"dtype": "bf16"} | settings)), ParallelConfig())
    load_weights(model, folder)
    return model


def inputs(model: Transformer, batch: int = BATCH, text: int = TEXT) -> tuple[Tensor, ...]:
    """Latents, timesteps, text, pooled, on the device."""
    return tuple(x.to(device()) for x in make_inputs(model.sizes, SIZE, batch, text))


def learn(model: Transformer, given: tuple[Tensor, ...]) -> tuple[Tensor, Gradients]:
    """Forward and backward of one micro-batch: velocity and gradients, float32."""
    for parameter in model.parameters():
        parameter.grad = None
    velocity = model(*given)
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2)).to(velocity)
    (velocity * weights).sum().backward()
    return velocity.detach(), {
        name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None
    }


def answer(model: Transformer, given: tuple[Tensor, ...]) -> Tensor:
    """Forward without gradients."""
    with torch.no_grad():
        return model(*given)


def distance(ours: Tensor | Gradients, theirs: Tensor | Gradients) -> float:
    """||a - b|| / ||b||, over all tensors of a mapping as over one vector."""
    if isinstance(ours, Mapping):
        assert isinstance(theirs, Mapping) and ours.keys() == theirs.keys()
        ours, theirs = (torch.cat([x.flatten() for x in all_.values()]) for all_ in (ours, theirs))
    assert not isinstance(theirs, Mapping)
    return ((ours - theirs).norm() / theirs.norm()).item()
