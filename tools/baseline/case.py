"""What the arms of a comparison have in common: the model, the method's numbers and the data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.config import StageConfig
from soar_mega.models.common.sizes import Sizes

LEARNING_RATE = 2e-5
TINY_PIPELINE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"

# SD3.5-Medium at 75 M parameters: small enough for a CPU, while time goes into matrix products and not into Python.
WIDE = {
    "num_layers": 8,
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "sample_size": 16,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "caption_projection_dim": 512,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (),
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. The model is a pipeline folder with its weights, or random weights of a
    configuration.
    """

    name: str
    pipeline_dir: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    stage: StageConfig
    batch_size: int
    dtype: str = "fp32"
    recompute: bool = False
    text_length: int = 20

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.transformer["sample_size"]
        return self.transformer["in_channels"], size, size

    @property
    def transformer(self) -> dict[str, Any]:
        """Sizes of the transformer, by diffusers' names."""
        if self.config:
            return self.config
        from soar_mega.models.family import read_sizes

        return read_sizes(self.pipeline_dir).to_diffusers()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A global batch of random numbers in the shapes of the data."""

    latents: Tensor  # [B, C, H, W]
    text: Tensor  # [B, S, D]
    pooled: Tensor  # [B, P]
    empty_text: Tensor  # [S, D]
    empty_pooled: Tensor  # [P]


def make_samples(case: Case, device: torch.device) -> Samples:
    g = torch.Generator().manual_seed(0)
    sizes = case.transformer

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    return Samples(
        latents=normal(case.batch_size, *case.latent_shape),
        text=normal(case.batch_size, case.text_length, sizes["joint_attention_dim"]),
        pooled=normal(case.batch_size, sizes["pooled_projection_dim"]),
        empty_text=normal(case.text_length, sizes["joint_attention_dim"]),
        empty_pooled=normal(sizes["pooled_projection_dim"]),
    )


def models() -> list[str]:
    """Names of the models that both sides can train."""
    return ["tiny", "wide", *_presets()]


def _presets() -> Mapping[str, Sizes]:
    """Of SD3, which is all that the baseline knows."""
    from soar_mega.models.family import families

    return families()["SD3Transformer2DModel"].presets


def make_case(model: str, **settings: Any) -> Case:
    """The comparison of that model; ValueError where it is none of `models`."""
    presets = _presets()
    if model == "tiny":
        return Case(name=model, pipeline_dir=str(TINY_PIPELINE), **settings)
    if model == "wide":
        return Case(name=model, config=presets["sd35_medium"].to_diffusers() | WIDE, **settings)
    if model in presets:
        # 512 px with a VAE of factor 8, and the 77 + 77 text tokens of the published training.
        config = presets[model].to_diffusers() | {"sample_size": 64}
        return Case(name=model, config=config, text_length=154, **settings)
    raise ValueError(f"--model {model!r} is unknown; choose {', '.join(models())}")
