"""Samples of keyed noise in place of a data set."""

from typing import Any

import torch

from soar_mega.config import Recipe
from soar_mega.data.batch import Batch
from soar_mega.distributed import data_rank, data_size, device
from soar_mega.flow import normal
from soar_mega.models.presets import model_sizes


class MadeUp:
    """Endless batches of one latent size, as `soar_mega.data.loader.Loader` yields them."""

    def __init__(self, recipe: Recipe, height: int, width: int, text_length: int) -> None:
        sizes = model_sizes(recipe.model)
        self._seed = recipe.train.seed
        self._global_batch_size = recipe.train.global_batch_size
        self._shape = (sizes.in_channels, height, width)
        self._text = (text_length, sizes.joint_attention_dim)
        self._pooled = (sizes.pooled_projection_dim,)
        self.consumed_samples = 0

    def __next__(self) -> Batch:
        mine = self._global_batch_size // data_size()
        position = self.consumed_samples + data_rank() * mine + torch.arange(mine)
        self.consumed_samples += self._global_batch_size

        def noise(stream: str, shape: tuple[int, ...]) -> torch.Tensor:
            return normal(self._seed, stream, position, 0, shape, device())

        return Batch(
            seed=self._seed,
            position=position.to(device()),
            valid=torch.ones(mine, dtype=torch.bool, device=device()),
            latent_shape=self._shape,
            text_length=self._text[0],
            latents=noise("latents", self._shape),
            text=noise("text", self._text),
            pooled=noise("pooled", self._pooled),
            empty_text=torch.zeros(self._text, device=device()),
            empty_pooled=torch.zeros(self._pooled, device=device()),
        )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A profile resumes nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """There is nothing to end."""
