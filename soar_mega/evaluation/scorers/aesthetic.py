"""LAION's aesthetic score: a linear head on the image feature of OpenAI's CLIP ViT-L/14, without the prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.pictures import to_pil
from soar_mega.evaluation.scorers.clip import read_clip
from soar_mega.evaluation.scorers.heads import LinearHead
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.pixels import by_pil
from soar_mega.evaluation.scorers.scorer_files import AESTHETIC_HEAD, CLIP_L, OPENAI_CLIP
from soar_mega.evaluation.scorers.state import fill, read_state

WIDTH = 768


class Aesthetic(PerImage):
    """From about 1 to 10."""

    name = "aesthetic"
    version = "1: sac+logos+ava1-l14-linearMSE on CLIP ViT-L/14"

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        head = weights_dir / AESTHETIC_HEAD.path
        super().__init__([*(weights_dir / file.path for file in CLIP_L), head], device)
        folder = weights_dir / OPENAI_CLIP
        self.clip = read_clip(folder, folder, device)
        self.head = fill(LinearHead(WIDTH), read_state(head), head, device)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        feature = self.clip.image_feature(by_pil(to_pil(image), self.clip.size))
        return {self.name: self.head(feature).item()}
