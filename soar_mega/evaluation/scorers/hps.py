"""HPSv2.1: CLIP ViT-H/14 fine-tuned on what people preferred, its cosine. The published file is one of open_clip."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig

from soar_mega.evaluation.pictures import from_pil, to_pil
from soar_mega.evaluation.scorers.clip import make_clip
from soar_mega.evaluation.scorers.open_clip_keys import to_transformers
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.pixels import by_padded_tensor
from soar_mega.evaluation.scorers.scorer_files import CLIP_H_TOKENIZER, HPS_WEIGHTS, LAION_CLIP
from soar_mega.evaluation.scorers.state import read_json, read_state

# What the library ftfy, which open_clip cleans text with, does to texts that are not broken: straight quotes, and
# letters of plain width in place of those for Chinese lines.
PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u3000": " "}
    | {chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)}
)


class HumanPreference(PerImage):
    """cos(image, prompt), published values about .28."""

    name = "hps"
    version = "1: HPS v2.1, cosine"

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        path = weights_dir / HPS_WEIGHTS.path
        super().__init__([path, *(weights_dir / file.path for file in CLIP_H_TOKENIZER)], device)
        state = to_transformers(read_state(path))
        self.clip = make_clip(clip_h_config(path.parent), state, path, weights_dir / LAION_CLIP, device)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        pixels = by_padded_tensor(from_pil(to_pil(image)), self.clip.size)
        return {self.name: self.clip.cosine(pixels, cleaned(prompt))}


def cleaned(prompt: str) -> str:
    """As open_clip cleans text; entities of HTML may be escaped twice."""
    return html.unescape(html.unescape(prompt.translate(PLAIN)))


def clip_h_config(folder: Path) -> CLIPConfig:
    """The sizes of open_clip's ViT-H-14; a config.json in the folder says others."""
    path = folder / "config.json"
    if path.is_file():
        return CLIPConfig.from_dict(read_json(path))
    return CLIPConfig(
        vision_config={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        projection_dim=1024,
    )
