"""One rank's share of a global batch."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from soar_mega.distributed import device


@dataclass(kw_only=True)
class Batch:
    """Samples of one step on one data-parallel rank. All of them are from one aspect bucket.

    `position` is a sample's place in the training sequence (not its index in the data set): all its random numbers are
    functions of (seed, position). Pipeline stages that do not need a tensor hold None: the first stage has latents,
    text and pooled, the last one latents, middle ones positions only.
    """

    seed: int
    position: Tensor  # [B] int64
    valid: Tensor  # [B] bool: False for samples that count for nothing, such as one that could not be read anywhere
    latent_shape: tuple[int, int, int]  # (C, H, W)
    text_length: int  # tokens of a prompt
    latents: Tensor | None = None  # [B, C, H, W] float32, scaled as the transformer expects
    text: Tensor | None = None  # [B, S, D]
    pooled: Tensor | None = None  # [B, P]
    empty_text: Tensor | None = None  # [S, D] the empty prompt
    empty_pooled: Tensor | None = None  # [P]
    prompt: Tensor | None = None  # [B] int64, the row of text and pooled that a sample has; None: its own
    collected: dict[str, Tensor] = field(default_factory=dict)  # [B] on the CPU, what a method drew itself
    names: list[str] = field(default_factory=list)  # the samples' keys, for messages

    def __len__(self) -> int:
        return len(self.position)


def on_device(batch: Batch) -> Batch:
    """The batch with its tensors on this process's device."""
    moved: dict[str, Any] = {
        f.name: value.to(device())
        for f in fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return replace(batch, **moved)
