"""A model that only predicts, over the ranks of its layout: no optimizer and no gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.engines.pipeline import Pipeline, predict_velocity
from soar_mega.flow import TIMESTEPS
from soar_mega.models.common.chunks import build_chunks
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.sizes import Sizes


class ShardedModel:
    """This rank's part of a model whose weights are to be loaded. Starts the world.

    Attributes:
        model: its chunks.

    Raises:
        ValueError: a layout or a precision that is not possible.
    """

    def __init__(self, sizes: Sizes, model: ModelConfig, parallel: ParallelConfig) -> None:
        start_world(parallel)
        self.model = build_chunks(sizes, model, parallel).eval()
        self._pipeline = Pipeline([_Wrapper(chunk) for chunk in self.model.chunks])

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [B, C, H, W] float32 on every rank. Collective: all ranks give the same states.

        Args:
            latents: [B, C, H, W]; sigma: [B] in [0, 1]; conditions: [B].
        """
        size = -(-len(latents) // self._pipeline.group)
        return predict_velocity(self._pipeline, latents, sigma * TIMESTEPS, conditions, size)


class _Wrapper(nn.Module):
    """What megatron's schedules expect around a chunk."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        return self.module(*inputs, **settings)
