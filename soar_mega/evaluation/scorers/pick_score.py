"""PickScore: CLIP ViT-H/14 fine-tuned on what people preferred, logit scale times cosine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.evaluation.pictures import to_pil
from soar_mega.evaluation.scorers.clip import read_clip
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.pixels import by_pil
from soar_mega.evaluation.scorers.scorer_files import LAION_CLIP, PICK_SCORE


class PickScore(PerImage):
    """exp(logit_scale) cos(image, prompt), published values about 22."""

    name = "pick_score"
    version = "1: PickScore_v1, logit scale x cosine"
    divisor = 1.0

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        super().__init__([weights_dir / file.path for file in PICK_SCORE], device)
        self.clip = read_clip(weights_dir / PICK_SCORE[0].place, weights_dir / LAION_CLIP, device)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        cosine = self.clip.cosine(by_pil(to_pil(image), self.clip.size), prompt)
        return {self.name: self.clip.logit_scale * cosine / self.divisor}


class PickScoreReward(PickScore):
    """The same divided by 26, as RL code has it, so that values are below 1."""

    name = "pick_score_rl"
    version = "1: PickScore_v1, logit scale x cosine / 26"
    divisor = 26.0
