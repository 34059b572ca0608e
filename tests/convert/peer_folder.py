"""Small transformer folders written by diffusers."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

SMALL = {
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

FLUX_SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 2, 4),
}


def save_small(folder: Path, dtype: str = "fp32", max_shard_size: str = "5GB") -> None:
    """Write <folder>/transformer."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SMALL)
    if dtype == "bf16":
        model.to(torch.bfloat16)
    model.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors."""
    return {
        key: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
