"""Latents, timesteps and pooled text on their way in. Formulas as in diffusers' SD3 embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor

from soar_mega.kernels import to_tokens
from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS, TwoLayers, timestep_waves
from soar_mega.models.sd3.sizes import SD3Sizes


class PatchProjection(torch.nn.Conv2d):
    """A convolution whose windows do not overlap, as what it is: a linear map of patches that are cut already."""

    def forward(self, patches: Tensor) -> Tensor:
        """[..., C p p] -> [..., hidden]."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbedding(torch.nn.Module):
    """Patches of the latents, plus a centre crop of a sine-cosine position table.

    The table is kept as a buffer because pipelines ship it in their weights, rounded to their type.
    """

    pos_embed: Tensor

    def __init__(self, config: SD3Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.max_size = config.pos_embed_max_size
        self.proj = PatchProjection(
            config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size, dtype=dtype
        )
        self.register_buffer("pos_embed", torch.empty(1, self.max_size**2, config.hidden_size, dtype=dtype))

    def forward(self, latents: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Latents [B, C, H, W], or their patches [B, H W / p^2, C p p] -> tokens [H W / p^2, B, hidden], row by row."""
        patches = to_tokens(latents, self.patch_size) if latents.ndim == 4 else latents
        height, width = latent_size[0] // self.patch_size, latent_size[1] // self.patch_size
        return self.proj(patches).transpose(0, 1) + self._crop(height, width)

    def _crop(self, height: int, width: int) -> Tensor:
        top, left = (self.max_size - height) // 2, (self.max_size - width) // 2
        table = self.pos_embed.view(self.max_size, self.max_size, -1)
        return table[top : top + height, left : left + width].reshape(height * width, 1, -1)


class ConditioningEmbedding(torch.nn.Module):
    """The vector that modulates every layer: timestep plus pooled text."""

    def __init__(self, config: SD3Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(TIMESTEP_CHANNELS, config.hidden_size, dtype)
        self.text_embedder = TwoLayers(config.pooled_projection_dim, config.hidden_size, dtype)

    def forward(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """Timesteps [B] in 0..1000 and pooled text [B, P] -> [B, hidden], after the SiLU of adaLN."""
        waves = timestep_waves(timesteps).to(pooled.dtype)
        return F.silu(self.timestep_embedder(waves) + self.text_embedder(pooled))


def position_table(config: SD3Sizes, device: torch.device) -> Tensor:
    """The sine-cosine table [1, max_size^2, hidden] float32: columns, then rows."""
    side, quarter = config.pos_embed_max_size, config.hidden_size // 4
    base_size = config.sample_size // config.patch_size
    # float32 positions and float64 angles: the roundings of diffusers, so that tables are equal to the bit
    positions = torch.arange(side, dtype=torch.float32, device=device) / (side / base_size)
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    angles = torch.outer(positions.double(), frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # [side, hidden / 2]
    columns = waves[None].expand(side, -1, -1)
    rows = waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, -1)
