"""What modulates every layer of FLUX: timestep, pooled text and, in a guidance-distilled model, the guidance scale."""

import torch
import torch.nn.functional as F
from torch import Tensor

from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS, TwoLayers, timestep_waves
from soar_mega.models.flux.sizes import FluxSizes

GUIDANCE_SCALE = 1000.0  # what a guidance scale is multiplied by, to have waves as a timestep has


class ConditioningEmbedding(torch.nn.Module):
    """The sum of two or three vectors."""

    def __init__(self, sizes: FluxSizes, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.timestep_embedder = TwoLayers(TIMESTEP_CHANNELS, hidden, dtype)
        self.guidance_embedder = None
        if sizes.guidance_embeds:
            self.guidance_embedder = TwoLayers(TIMESTEP_CHANNELS, hidden, dtype)
        self.text_embedder = TwoLayers(sizes.pooled_projection_dim, hidden, dtype)

    def forward(self, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """Timesteps [B] in 0..1000, pooled text [B, P], guidance scales [B] -> [B, hidden], after the SiLU of adaLN."""
        vector = self.timestep_embedder(timestep_waves(timesteps).to(pooled.dtype)) + self.text_embedder(
            pooled
        )
        if self.guidance_embedder is not None:
            assert guidance is not None
            waves = timestep_waves(GUIDANCE_SCALE * guidance.float())
            vector = vector + self.guidance_embedder(waves.to(pooled.dtype))
        return F.silu(vector)
