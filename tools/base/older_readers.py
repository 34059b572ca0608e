"""What older transformers and diffusers need beside what the newest ones save: trainers pin transformers 4.40."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection

from soar_mega.user_files import read_object

# of every published CLIP; flow_grpo and DiffusionNFT pad prompts to it, whatever the tokenizer says
CLIP_POSITIONS = 77
T5_CLASS = (
    "T5TokenizerFast"  # the one that reads tokenizer.json; T5Tokenizer was another one before transformers 5
)


def with_positions(clip: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """A CLIP with CLIP_POSITIONS, the new ones like its last. It answers no differently to texts that fitted before."""
    embeddings = clip.text_model.embeddings
    table = embeddings.position_embedding.weight
    whole = torch.cat([table, table[-1:].expand(CLIP_POSITIONS - len(table), -1)])
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(whole.detach())
    embeddings.register_buffer("position_ids", torch.arange(CLIP_POSITIONS)[None], persistent=False)
    clip.config.max_position_embeddings = CLIP_POSITIONS
    return clip


def add_tokenizer_files(folder: Path) -> None:
    """Write vocab.json and merges.txt beside each CLIP's tokenizer.json, and name T5's tokenizer as it was."""
    index = read_object(folder / "model_index.json")
    for part in (name for name in index if name.startswith("tokenizer")):
        if index[part][1] == "CLIPTokenizer":
            model = read_object(folder / part / "tokenizer.json")["model"]
            lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
            (folder / part / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            _write(folder / part / "vocab.json", model["vocab"])
        else:
            index[part][1] = T5_CLASS
            config = folder / part / "tokenizer_config.json"
            _write(config, {**read_object(config), "tokenizer_class": T5_CLASS})
    _write(folder / "model_index.json", index)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
