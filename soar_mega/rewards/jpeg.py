"""How large an image is as a JPEG: rewards without a model, whose optimum is known (Black et al. 2023).

Their values are those of Flow-GRPO: the image rounded to 8 bits and saved at quality 95.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import features
from torch import Tensor

from soar_mega.evaluation.pictures import to_pil

QUALITY = 95
SCALE = 500  # kB that count as one unit of compressibility


class JpegIncompressibility:
    """The size in kB (1000 bytes)."""

    name = "jpeg_incompressibility"
    version = f"quality {QUALITY}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    weights_hash = ""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        return {self.name: torch.tensor([_kilobytes(image) for image in images], dtype=torch.float64)}


class JpegCompressibility:
    """The size in kB, negative, over 500."""

    name = "jpeg_compressibility"
    version = JpegIncompressibility.version
    weights_hash = ""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        return {
            self.name: torch.tensor([-_kilobytes(image) / SCALE for image in images], dtype=torch.float64)
        }


def _kilobytes(image: Tensor) -> float:
    # [3, H, W] in [0, 1]
    file = BytesIO()
    to_pil(image.cpu()).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
