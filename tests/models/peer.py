"""diffusers' transformer as the peer that our model must equal."""

import random
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.models.common.tensor_map import parts
from soar_mega.models.sd3.sizes import SD3Sizes

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
    "dual_attention_layers": (0, 2),
    "qk_norm": "rms_norm",
}


def random_case(seed: int) -> tuple[dict[str, Any], tuple[int, int], int, int]:
    """A small configuration with a latent size, a batch and a text length; odd seeds have no QK norm."""
    draw = random.Random(seed)
    heads, width, layers = draw.choice([2, 3, 4]), draw.choice([4, 8]), draw.choice([1, 2, 3])
    patch, table = draw.choice([1, 2]), draw.choice([6, 9])
    changes = {
        "sample_size": patch * draw.choice([4, 7]),
        "patch_size": patch,
        "in_channels": draw.choice([3, 4]),
        "out_channels": draw.choice([3, 4]),
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "caption_projection_dim": heads * width,
        "pos_embed_max_size": table,
        "dual_attention_layers": tuple(n for n in range(layers) if draw.random() < 0.5),
        "qk_norm": None if seed % 2 else "rms_norm",
    }
    size = (patch * draw.randint(2, table), patch * draw.randint(2, table))
    return changes, size, draw.randint(1, 3), draw.choice([1, 5, 77, 333])


def make_peer(seed: int = 0, **changes: Any) -> Any:
    """A diffusers transformer with no weight at a special value."""
    return random_peer("SD3Transformer2DModel", seed, **{**SMALL, **changes})


def random_peer(kind: str, seed: int, **sizes: Any) -> Any:
    """A transformer of one of diffusers' classes, with no weight at a special value."""
    import diffusers

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = getattr(diffusers, kind)(**sizes)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return peer


def save_peer(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **changes: Any) -> Any:
    """Write such a transformer as a pipeline's transformer folder and return it."""
    peer = make_peer(seed, **changes)
    peer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    return peer


def make_inputs(
    config: SD3Sizes, size: tuple[int, int] = (8, 6), batch: int = 2, text: int = 5
) -> tuple[Tensor, ...]:
    """Latents, timesteps, text, pooled."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timesteps = torch.tensor([3.0, 712.375, 999.5])[:batch]
    return (
        normal(batch, config.in_channels, *size),
        timesteps,
        normal(batch, text, config.joint_attention_dim),
        normal(batch, config.pooled_projection_dim),
    )


def run_peer(peer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """The peer's velocity in float64, so that a difference is a rounding of ours alone."""
    peer.double()
    latents, timesteps, text, pooled = (x.double() for x in inputs)
    return peer(latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=timesteps).sample


def to_peer_names(config: SD3Sizes, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our full tensors (parameters or gradients) under the peer's names."""
    result: dict[str, Tensor] = {}
    for entry in config.family.entries(config):
        if entry.name in tensors:
            found = parts(tensors[entry.name], entry, config.num_attention_heads)
            for key, part in zip(entry.keys, found):
                before = [result[key]] if entry.columns is not None and key in result else []
                result[key] = torch.cat([*before, part.reshape(entry.shape)], dim=-1)
    return result


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """max|a - b| / max|b|; the divisor is at least `floor`."""
    return ((ours - theirs).abs().max() / max(theirs.abs().max().item(), floor)).item()


def gradient_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name; the divisor is at least 1e-3 of the model's largest entry: some true ones are zero."""
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in theirs.values())
    return {name: relative_error(ours[name], theirs[name], floor) for name in theirs}
