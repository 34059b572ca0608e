"""Tiny random weights in the files and of the classes of the published ones, so that every path runs without those.

Their values mean nothing.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPConfig, CLIPModel

from soar_mega.evaluation.scorers.weights import OPENAI_CLIP

TEXT_LENGTH = 77


def write_tiny_weights(name: str, weights_dir: Path) -> None:
    """All files that the scorer `name` reads, the same at every call."""
    WRITERS[name](weights_dir)


def write_clip_l(weights_dir: Path) -> None:
    """OpenAI's CLIP."""
    folder = weights_dir / OPENAI_CLIP
    write_clip_tokenizer(folder)
    model = CLIPModel(tiny_clip_config())
    randomize(model)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(model.state_dict(), folder / "model.safetensors")


def write_clip_tokenizer(folder: Path) -> None:
    """Each byte is a token, at the end of a word another one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tiny_clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def tiny_clip_vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def tiny_clip_config() -> CLIPConfig:
    """Two layers of width 32 on images of 28 pixels."""
    vocabulary = tiny_clip_vocabulary()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    return CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": 28, "patch_size": 14},
        projection_dim=768,
    )


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every parameter from a normal distribution whose width keeps activations of about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(fan_in, 4) ** 0.5)


WRITERS = {"clip_score": write_clip_l}
