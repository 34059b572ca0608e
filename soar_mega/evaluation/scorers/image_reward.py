"""ImageReward v1.0: BLIP's text encoder reads the prompt with the image, a linear head gives the reward.

Names of the published file to those of transformers' `BlipVisionModel` and `BlipTextModel`:

    blip.visual_encoder.cls_token, pos_embed        embeddings.class_embedding, position_embedding
    blip.visual_encoder.patch_embed.proj            embeddings.patch_embedding
    blip.visual_encoder.blocks.N                    encoder.layers.N
        norm1, norm2, mlp                               layer_norm1, layer_norm2, mlp
        attn.qkv, attn.proj                             self_attn.qkv, self_attn.projection
    blip.visual_encoder.norm                        post_layernorm
    blip.text_encoder.*                             *
    mlp.*                                           the head
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from soar_mega.evaluation.pictures import to_pil
from soar_mega.evaluation.scorers.heads import LinearHead
from soar_mega.evaluation.scorers.per_image import PerImage
from soar_mega.evaluation.scorers.pixels import by_pil
from soar_mega.evaluation.scorers.scorer_files import BERT_VOCABULARY, IMAGE_REWARD_WEIGHTS
from soar_mega.evaluation.scorers.state import fill, fill_model, read_json, read_state

# of the rewards of the training set
MEAN = 0.16717362830052426
STD = 1.0333394966054072
TEXT_LENGTH = 35
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class ImageReward(PerImage):
    """Normalised to mean 0 and standard deviation 1 on the authors' training set."""

    name = "image_reward"
    version = "1: ImageReward-v1.0"

    def __init__(self, weights_dir: Path, device: torch.device) -> None:
        path, vocabulary = weights_dir / IMAGE_REWARD_WEIGHTS.path, weights_dir / BERT_VOCABULARY.path
        super().__init__([path, vocabulary], device)
        vision, text, head = split(read_state(path))
        vision_config, text_config = blip_configs(path.parent)
        self.size: int = vision_config.image_size
        self.vision = fill_model(BlipVisionModel, vision_config, vision, path, device)
        self.text = fill_model(BlipTextModel, text_config, text, path, device, add_pooling_layer=False)
        self.head = fill(LinearHead(text_config.hidden_size), head, path, device)
        self.tokenizer = read_bert_tokenizer(vocabulary)

    def judge(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> dict[str, float]:
        pixels = by_pil(to_pil(image), self.size, rounded_crop=True).to(self.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return {self.name: (self.head(read[:, 0]).item() - MEAN) / STD}


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the vision model, of the text model and of the head, under transformers' names.

    What else the file has under "blip." (projections of BLIP's training) is not used.
    """
    vision, text, head = {}, {}, {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            vision[_vision_name(name.removeprefix("blip.visual_encoder."))] = value
        elif name.startswith("blip.text_encoder."):
            if not name.endswith(".position_ids"):
                text[name.removeprefix("blip.text_encoder.")] = value
        elif not name.startswith("blip."):
            head[name.removeprefix("mlp.")] = value
    return vision, text, head


def _vision_name(name: str) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
    if block:
        return f"encoder.layers.{block[1]}.{BLOCK_NAMES.get(block[2], block[2])}.{block[3]}"
    for theirs, ours in VISION_NAMES.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def blip_configs(folder: Path) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The sizes of ImageReward v1.0; a config.json of a `BlipConfig` in the folder says others."""
    path = folder / "config.json"
    if path.is_file():
        told = read_json(path)
        return BlipVisionConfig(**told["vision_config"]), BlipTextConfig(**told["text_config"])
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    return vision, text


def read_bert_tokenizer(path: Path) -> BertTokenizer:
    """Of vocab.txt, one token a line."""
    words = path.read_text(encoding="utf-8").split("\n")
    return BertTokenizer(vocab={word: index for index, word in enumerate(words) if word})
