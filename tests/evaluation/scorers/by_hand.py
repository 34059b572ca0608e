"""The published formulas in float64 from plain operations, on weights under their published names."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

State = Mapping[str, Tensor]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()


def norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * state[f"{name}.weight"].double() + state[f"{name}.bias"].double()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[T, D] each; mask [T, S] is added."""
    parts = []
    for q1, k1, v1 in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        scores = q1 @ k1.T / math.sqrt(q1.shape[-1])
        parts.append((scores if mask is None else scores + mask).softmax(-1) @ v1)
    return torch.cat(parts, -1)


def causal(length: int) -> Tensor:
    return torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def patches(state: State, weight: str, pixels: Tensor) -> Tensor:
    kernel = state[weight].double()
    return conv2d(pixels[None], kernel, stride=kernel.shape[-1])[0].flatten(1).T


class Clip:
    """transformers' names."""

    def __init__(self, state: State, activation: Callable[[Tensor], Tensor], heads: int = 2) -> None:
        self.state, self.activation, self.heads = state, activation, heads

    def block(self, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
        y = norm(self.state, f"{name}.layer_norm1", x)
        q, k, v = (linear(self.state, f"{name}.self_attn.{letter}_proj", y) for letter in "qkv")
        x = x + linear(self.state, f"{name}.self_attn.out_proj", attend(q, k, v, self.heads, mask))
        y = self.activation(linear(self.state, f"{name}.mlp.fc1", norm(self.state, f"{name}.layer_norm2", x)))
        return x + linear(self.state, f"{name}.mlp.fc2", y)

    def image(self, pixels: Tensor) -> Tensor:
        tower = "vision_model"
        x = patches(self.state, f"{tower}.embeddings.patch_embedding.weight", pixels)
        x = torch.cat([self.state[f"{tower}.embeddings.class_embedding"].double()[None], x])
        x = x + self.state[f"{tower}.embeddings.position_embedding.weight"].double()
        x = norm(self.state, f"{tower}.pre_layrnorm", x)
        for layer in range(2):
            x = self.block(f"{tower}.encoder.layers.{layer}", x, None)
        x = norm(self.state, f"{tower}.post_layernorm", x[0])
        return unit(self.state["visual_projection.weight"].double() @ x)

    def text(self, tokens: list[int]) -> Tensor:
        tower = "text_model"
        x = self.state[f"{tower}.embeddings.token_embedding.weight"].double()[tokens]
        x = x + self.state[f"{tower}.embeddings.position_embedding.weight"].double()[: len(tokens)]
        for layer in range(2):
            x = self.block(f"{tower}.encoder.layers.{layer}", x, causal(len(tokens)))
        x = norm(self.state, f"{tower}.final_layer_norm", x[-1])  # the end token is the last
        return unit(self.state["text_projection.weight"].double() @ x)


class OpenClip:
    """open_clip's names, and its packed projections."""

    def __init__(self, state: State, heads: int = 2) -> None:
        self.state, self.heads = state, heads

    def block(self, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
        y = norm(self.state, f"{name}.ln_1", x)
        packed = y @ self.state[f"{name}.attn.in_proj_weight"].double().T
        q, k, v = (packed + self.state[f"{name}.attn.in_proj_bias"].double()).chunk(3, -1)
        x = x + linear(self.state, f"{name}.attn.out_proj", attend(q, k, v, self.heads, mask))
        y = gelu(linear(self.state, f"{name}.mlp.c_fc", norm(self.state, f"{name}.ln_2", x)))
        return x + linear(self.state, f"{name}.mlp.c_proj", y)

    def image(self, pixels: Tensor) -> Tensor:
        x = patches(self.state, "visual.conv1.weight", pixels)
        x = torch.cat([self.state["visual.class_embedding"].double()[None], x])
        x = norm(self.state, "visual.ln_pre", x + self.state["visual.positional_embedding"].double())
        for layer in range(2):
            x = self.block(f"visual.transformer.resblocks.{layer}", x, None)
        return unit(norm(self.state, "visual.ln_post", x[0]) @ self.state["visual.proj"].double())

    def text(self, tokens: list[int]) -> Tensor:
        x = self.state["token_embedding.weight"].double()[tokens]
        x = x + self.state["positional_embedding"].double()[: len(tokens)]
        for layer in range(2):
            x = self.block(f"transformer.resblocks.{layer}", x, causal(len(tokens)))
        end = norm(self.state, "ln_final", x)[max(range(len(tokens)), key=lambda i: tokens[i])]
        return unit(end @ self.state["text_projection"].double())


def head(state: State, prefix: str, x: Tensor) -> float:
    for layer in (0, 2, 4, 6, 7):
        x = linear(state, f"{prefix}layers.{layer}", x)
    return x.item()


def image_reward(state: State, pixels: Tensor, tokens: list[int], heads: int = 2) -> float:
    """BLIP under the names of ImageReward's file; its tokens without padding, which is masked there."""
    name = "blip.visual_encoder"
    x = patches(state, f"{name}.patch_embed.proj.weight", pixels)
    x = x + state[f"{name}.patch_embed.proj.bias"].double()
    x = torch.cat([state[f"{name}.cls_token"][0].double(), x]) + state[f"{name}.pos_embed"][0].double()
    for layer in range(2):
        block = f"{name}.blocks.{layer}"
        q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attend(q, k, v, heads))
        y = gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", y)
    seen = norm(state, f"{name}.norm", x, 1e-6)
    name = "blip.text_encoder"
    x = state[f"{name}.embeddings.word_embeddings.weight"].double()[tokens]
    x = x + state[f"{name}.embeddings.position_embeddings.weight"].double()[: len(tokens)]
    x = norm(state, f"{name}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(2):
        block = f"{name}.encoder.layer.{layer}"
        for attention in ("attention", "crossattention"):
            read = x if attention == "attention" else seen
            q = linear(state, f"{block}.{attention}.self.query", x)
            k, v = (linear(state, f"{block}.{attention}.self.{part}", read) for part in ("key", "value"))
            y = linear(state, f"{block}.{attention}.output.dense", attend(q, k, v, heads))
            x = norm(state, f"{block}.{attention}.output.LayerNorm", x + y, 1e-12)
        y = linear(state, f"{block}.output.dense", gelu(linear(state, f"{block}.intermediate.dense", x)))
        x = norm(state, f"{block}.output.LayerNorm", x + y, 1e-12)
    return (head(state, "mlp.", x[0]) - 0.16717362830052426) / 1.0333394966054072


def clip_tokens(folder: Path, text: str, length: int = 77) -> list[int]:
    """Byte by byte, as a vocabulary without merges has it; for lower-case letters, digits and spaces."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokens = []
    for word in text.split(" "):
        pieces = [*word] if word.isdigit() else [*word[:-1], f"{word[-1]}</w>"]
        tokens += [vocabulary[f"{piece}</w>" if word.isdigit() else piece] for piece in pieces]
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    return [start, *tokens[: length - 2], end]


def eight_bits(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def normalized(image: Tensor) -> Tensor:
    return (image.double() - MEAN) / STD


def resized_by_pil(image: Tensor, width: int, height: int) -> Tensor:
    """[3, height, width] in [0, 1]"""
    small = eight_bits(image).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).double() / 255


def resized_tensor(image: Tensor, width: int, height: int, mode: str) -> Tensor:
    return interpolate(image.double()[None], (height, width), mode=mode, antialias=True)[0]
