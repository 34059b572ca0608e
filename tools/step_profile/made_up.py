"""Samples of keyed noise in place of a data set."""

from dataclasses import replace
from typing import Any

import torch

from soar_mega.config import Recipe
from soar_mega.data.batch import Batch
from soar_mega.data.info import DatasetInfo
from soar_mega.distributed import data_rank, data_size, device
from soar_mega.flow import normal
from soar_mega.models.family import model_sizes


class MadeUp:
    """Endless batches as `soar_mega.data.loader.Loader` yields them, each with the same latents and text."""

    def __init__(self, recipe: Recipe, height: int, width: int, text_length: int) -> None:
        sizes = model_sizes(recipe.model)
        self._global_batch_size = recipe.train.global_batch_size
        mine = self._global_batch_size // data_size()
        shape = (sizes.in_channels, height, width)
        text, pooled = (text_length, sizes.joint_attention_dim), (sizes.pooled_projection_dim,)
        self.info = DatasetInfo(
            buckets={f"{width}x{height}": self._global_batch_size},
            latent_channels=sizes.in_channels,
            vae_scale_factor=1,
            text_shape=text,
            pooled_size=sizes.pooled_projection_dim,
            max_sequence_length=text_length,
            text_dtype="float32",
            encoders={},
        )
        self._position = data_rank() * mine + torch.arange(mine)

        def noise(stream: str, shape: tuple[int, ...]) -> torch.Tensor:
            return normal(recipe.train.seed, stream, self._position, 0, shape, device())

        self._batch = Batch(
            seed=recipe.train.seed,
            position=self._position.to(device()),
            valid=torch.ones(mine, dtype=torch.bool, device=device()),
            latent_shape=shape,
            text_length=text_length,
            latents=noise("latents", shape),
            text=noise("text", text),
            pooled=noise("pooled", pooled),
            empty_text=torch.zeros(text, device=device()),
            empty_pooled=torch.zeros(pooled, device=device()),
        )
        self.consumed_samples = 0

    def __next__(self) -> Batch:
        position = (self.consumed_samples + self._position).to(device())
        self.consumed_samples += self._global_batch_size
        return replace(self._batch, position=position)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A profile resumes nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """There is nothing to end."""
