"""diffusers' FLUX transformer as the peer that ours must equal."""

import random
from pathlib import Path
from typing import Any

import torch
from peer import random_peer
from torch import Tensor

SMALL: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 4, 2),
}


def random_case(seed: int) -> tuple[dict[str, Any], tuple[int, int], int, int]:
    """A small configuration with a latent size, a batch and a text length; odd seeds have no guidance."""
    draw = random.Random(seed)
    axes = draw.choice([(2, 4, 2), (4, 6, 6), (2, 2, 4), (4, 10, 10)])
    changes = {
        "in_channels": 4 * draw.choice([1, 3, 4]),
        "num_layers": draw.choice([1, 2]),
        "num_single_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": draw.choice([1, 2, 3]),
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "guidance_embeds": seed % 2 == 0,
    }
    size = (2 * draw.randint(1, 9), 2 * draw.randint(1, 9))
    return changes, size, draw.randint(1, 3), draw.choice([1, 5, 77, 333])


def make_peer(seed: int = 0, **changes: Any) -> Any:
    """A diffusers transformer with no weight at a special value."""
    return random_peer("FluxTransformer2DModel", seed, **{**SMALL, **changes})


def save_peer(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **changes: Any) -> Any:
    """Write such a transformer as a pipeline's transformer folder and return it."""
    peer = make_peer(seed, **changes)
    peer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    return peer


def make_inputs(
    sizes: Any, size: tuple[int, int] = (8, 6), batch: int = 2, text: int = 5
) -> tuple[Tensor, ...]:
    """Latents, timesteps, text, pooled and, in a guidance-distilled model, guidance."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = (
        normal(batch, sizes.in_channels, *size),
        torch.tensor([3.0, 712.375, 999.5])[:batch],
        normal(batch, text, sizes.joint_attention_dim),
        normal(batch, sizes.pooled_projection_dim),
    )
    return (*inputs, torch.tensor([3.5, 1.0, 7.25])[:batch]) if sizes.guidance_embeds else inputs


def run_peer(peer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """The peer's velocity in float64, packed and unpacked as diffusers' pipeline does it."""
    from diffusers import FluxPipeline

    peer.double()
    latents, timesteps, text, pooled, *guidance = (x.double() for x in inputs)
    batch, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float64)
    velocity = peer(
        packed,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=timesteps / 1000,
        guidance=guidance[0] if guidance else None,
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.float64),
    ).sample
    return FluxPipeline._unpack_latents(velocity, 8 * height, 8 * width, vae_scale_factor=8)
