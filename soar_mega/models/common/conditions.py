"""What a velocity is conditioned on, beside the state and its time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What the model is told about each of its inputs.

    Attributes:
        text: [B, S, D] embeddings of the prompts' tokens.
        pooled: [B, P] one vector for each prompt.
        guidance: [B] float32, the scale that a guidance-distilled model is told; None for other models.
    """

    text: Tensor
    pooled: Tensor
    guidance: Tensor | None = None

    @property
    def text_length(self) -> int:
        """Tokens of a prompt."""
        return self.text.shape[1]

    def __len__(self) -> int:
        return len(self.text)

    def told(self, guidance_scale: float) -> "Conditions":
        """The same for a guidance-distilled model."""
        return replace(self, guidance=torch.full((len(self),), guidance_scale, device=self.text.device))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        """The same with each tensor changed: other rows, another device."""
        guidance = None if self.guidance is None else change(self.guidance)
        return Conditions(change(self.text), change(self.pooled), guidance)

    def rows(self, index: Tensor) -> "Conditions":
        """Those at the rows `index` [M] int64, which are on the same device."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditions":
        """Embeddings as the model computes with them; the guidance stays float32, as timesteps do."""
        moved = self.map(lambda tensor: tensor.to(device))
        return replace(moved, text=moved.text.to(dtype), pooled=moved.pooled.to(dtype))
