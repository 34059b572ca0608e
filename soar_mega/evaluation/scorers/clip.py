"""A CLIP of transformers with its tokenizer, from local files."""

from collections.abc import Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from soar_mega.evaluation.scorers.scorer_files import as_it_is
from soar_mega.evaluation.scorers.state import fill_model, read_json, read_state

# three scorers of the published table read one CLIP of 1.7 GB
_held: WeakValueDictionary[tuple[object, ...], "Clip"] = WeakValueDictionary()


class Clip:
    """Both towers of a CLIP.

    Attributes:
        size: edge of the images that it reads, pixels.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.size: int = model.config.vision_config.image_size
        self.length: int = model.config.text_config.max_position_embeddings

    def image_feature(self, pixels: Tensor) -> Tensor:
        """Of length 1. [1, 3, size, size] -> [1, D]"""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return normalize(self.model.visual_projection(pooled), dim=-1)

    def text_feature(self, text: str) -> Tensor:
        """Of length 1: [1, D]. A long text is cut, its end token kept."""
        tokens = self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")
        pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return normalize(self.model.text_projection(pooled), dim=-1)

    def cosine(self, pixels: Tensor, text: str) -> float:
        """Of an image [1, 3, size, size] and a text."""
        return (self.image_feature(pixels) * self.text_feature(text)).sum().item()

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by."""
        return self.model.logit_scale.exp().item()


def read_clip(folder: Path, tokenizer_folder: Path, device: torch.device) -> Clip:
    """The CLIP of a folder with config.json and model.safetensors; the same object for all who hold it at a time.

    Raises:
        ValueError: a file is damaged, or the weights are not those of the configuration.
        FileNotFoundError: one is not there.
    """
    path = folder / "model.safetensors"
    files = (folder / "config.json", path, tokenizer_folder / "vocab.json", tokenizer_folder / "merges.txt")
    key = (device, *map(as_it_is, files))
    clip = _held.get(key)
    if clip is None:
        config = CLIPConfig.from_dict(read_json(folder / "config.json"))
        clip = _held[key] = make_clip(config, read_state(path), path, tokenizer_folder, device)
    return clip


def make_clip(
    config: CLIPConfig, state: Mapping[str, Tensor], path: Path, tokenizer_folder: Path, device: torch.device
) -> Clip:
    """The CLIP of weights under transformers' names, which are from `path`.

    Raises:
        ValueError: the weights are not those of the configuration, or the vocabulary is another one's.
    """
    # Files of older versions of transformers hold the numbers 0, 1, 2, ...
    weights = {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    model = fill_model(CLIPModel, config, weights, path, device)
    tokenizer = read_tokenizer(tokenizer_folder)
    if len(tokenizer) != config.text_config.vocab_size:
        raise ValueError(
            f"{tokenizer_folder} has {len(tokenizer)} tokens, the CLIP of {path} reads "
            f"{config.text_config.vocab_size}"
        )
    return Clip(model, tokenizer, device)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Of vocab.json and merges.txt, whose first line is a title."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines[1:] if line.strip()]
    return CLIPTokenizer(vocab=read_json(folder / "vocab.json"), merges=merges)
