"""GenEval: whether an image shows the objects, numbers, colours and positions that its prompt demands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from soar_mega.evaluation.pictures import to_pil
from soar_mega.evaluation.scorers.clip import Clip, read_clip
from soar_mega.evaluation.scorers.detector import Detector
from soar_mega.evaluation.scorers.gen_eval_rules import (
    COLORS,
    FAILURES,
    Found,
    check_metadata,
    judge,
    share_met,
    sure_objects,
)
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.pixels import by_pil
from soar_mega.evaluation.scorers.scorer_files import CLIP_L, DETECTOR, OPENAI_CLIP

BACKGROUND = "#999"
COLOR_PHRASES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class ColorReader:
    """Tells the colour of an object by the nearest phrase of CLIP."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.phrases: dict[str, Tensor] = {}  # of a class, [colours, D]

    def read(self, image: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        """The colour of each object of class `name`: alone on grey, cut out by its box."""
        crops = [by_pil(crop(image, item), self.clip.size, rounded_crop=True) for item in objects]
        features = torch.cat([self.clip.image_feature(pixels) for pixels in crops])
        return [COLORS[index] for index in (features @ self._features(name).T).argmax(1).tolist()]

    def _features(self, name: str) -> Tensor:
        if name not in self.phrases:
            self.phrases[name] = torch.stack([self._mean(name, color) for color in COLORS])
        return self.phrases[name]

    def _mean(self, name: str, color: str) -> Tensor:
        phrases = [phrase.format(color=color, name=name) for phrase in COLOR_PHRASES]
        return normalize(torch.cat([self.clip.text_feature(phrase) for phrase in phrases]).mean(0), dim=-1)


def crop(image: Image.Image, item: Found) -> Image.Image:
    """An object's pixels on grey within its box."""
    mask = Image.fromarray(item.mask.numpy())
    return Image.composite(image, Image.new("RGB", image.size, BACKGROUND), mask).crop(item.box)


class GenEval(PerImage):
    """1 where all demands are met, else 0, with the kinds of failure beside it."""

    name = "gen_eval"
    version = "1: Mask2Former Swin-S, CLIP ViT-L/14, thresholds .3, .9, .1"
    values = ("gen_eval", *(f"gen_eval/{kind}" for kind in FAILURES))

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        path = weights_dir / DETECTOR.path
        super().__init__([path, *(weights_dir / file.path for file in CLIP_L)], device)
        self.detector = Detector(path, device)
        folder = weights_dir / OPENAI_CLIP
        self.colors = ColorReader(read_clip(folder, folder, device))

    def check(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """See `Particular`."""
        check_metadata(metadata)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        check_metadata(metadata)
        picture = to_pil(image)
        objects = sure_objects(self.detector.find((image * 255).round()), metadata["tag"])
        return self.values_of(objects, metadata, picture)

    def values_of(
        self, objects: Mapping[str, Sequence[Found]], metadata: Mapping[str, Any], picture: Image.Image
    ) -> dict[str, float]:
        """Of an image with these objects."""
        verdict = judge(objects, metadata, lambda group, name: self.colors.read(picture, group, name))
        kinds = {kind for kind, _ in verdict.failures}
        return {self.name: float(verdict.correct)} | {
            f"{self.name}/{kind}": float(kind in kinds) for kind in FAILURES
        }


class GenEvalReward(GenEval):
    """How far the demands are met, as flow_grpo trains on, and whether they are met exactly."""

    name = "gen_eval_rl"
    version = "1: Mask2Former Swin-S, CLIP ViT-L/14, share of demands"
    values = ("gen_eval_rl", "gen_eval_rl/strict")

    def values_of(
        self, objects: Mapping[str, Sequence[Found]], metadata: Mapping[str, Any], picture: Image.Image
    ) -> dict[str, float]:
        share, strict = share_met(
            objects, metadata, lambda group, name: self.colors.read(picture, group, name)
        )
        return {self.name: share, f"{self.name}/strict": float(strict)}
