"""CLIPScore: the cosine of image and prompt by OpenAI's CLIP ViT-L/14, as the published table of SOAR has it.

That table's script makes images smaller by torch's antialiased bilinear filter, where CLIP's own processor has PIL's
bicubic one, and does not round them to 8 bits first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.scorers.clip import read_clip
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.pixels import by_bilinear_tensor
from soar_mega.evaluation.scorers.scorer_files import CLIP_L, OPENAI_CLIP


class ClipScore(PerImage):
    """cos(image, prompt), about .3 for an image that shows its prompt."""

    name = "clip_score"
    version = "1: CLIP ViT-L/14, cosine, bilinear"

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        super().__init__([weights_dir / file.path for file in CLIP_L], device)
        folder = weights_dir / OPENAI_CLIP
        self.clip = read_clip(folder, folder, device)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        return {self.name: self.clip.cosine(by_bilinear_tensor(image, self.clip.size), prompt)}
