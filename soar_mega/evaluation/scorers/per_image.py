"""A scorer that judges one image at a time, so that a value depends on nothing beside its image."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.scorers.pixels import in_range
from soar_mega.evaluation.scorers.scorer_files import hash_of_files


class PerImage(ABC):
    """The protocol `evaluation.scorer.Scorer` by one method, `judge`.

    Matrix products of another batch size round otherwise; one image at a time gives the same value to the last bit in
    any batch, at any world size and after a restart.

    Attributes:
        values: the names of all values that it gives, its own first.
        files: what it read.
    """

    name: str
    version: str
    values: tuple[str, ...] = ()

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        self.files, self.device = tuple(files), device

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the files that it read."""
        return hash_of_files(self.files)

    @abstractmethod
    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        """The values of one image [3, H, W] in [0, 1]."""

    @torch.inference_mode()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """See `Scorer.score`. An image with NaN or infinite numbers gets NaN for every value.

        Raises:
            ValueError: an image is not in [0, 1], or a prompt or its metadata cannot be judged.
        """
        names = self.values or (self.name,)
        rows = []
        for image, prompt, facts in zip(images, prompts, metadata, strict=True):
            if not image.isfinite().all():
                rows.append(dict.fromkeys(names, math.nan))
                continue
            rows.append(self.judge(in_range(image), prompt, facts))
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names}
