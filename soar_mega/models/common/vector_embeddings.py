"""One number or vector per sample on its way into the vector that modulates every layer. Formulas as in diffusers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TIMESTEP_CHANNELS = 256


class TwoLayers(torch.nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_features: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(in_features, hidden_size, dtype=dtype)
        self.linear_2 = torch.nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> [B, hidden]."""
        return self.linear_2(F.silu(self.linear_1(features)))


def timestep_waves(timesteps: Tensor) -> Tensor:
    """Timesteps [B] -> cosines, then sines, of geometric frequencies [B, 256] float32."""
    half = TIMESTEP_CHANNELS // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
