"""The tiny FLUX pipeline: the encoders of the tiny SD3 pipeline, and a transformer of its own."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer


def build_transformer() -> FluxTransformer2DModel:
    """2 double and 4 single layers of 4 heads x 16: TP 1, 2, 4 and PP 1, 2, 3, 6 apply."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def write_pipeline(sd3: Path, folder: Path, seed: int) -> None:
    """Write the whole pipeline folder; the transformer has random weights."""
    torch.manual_seed(seed)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(
        vae=AutoencoderKL.from_pretrained(sd3 / "vae"),
        text_encoder=_clip_without_projection(sd3 / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(sd3 / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(sd3 / "text_encoder_3"),
        tokenizer_2=T5Tokenizer.from_pretrained(sd3 / "tokenizer_3"),
        transformer=build_transformer(),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def _clip_without_projection(folder: Path) -> CLIPTextModel:
    """What FLUX takes of a CLIP is its pooled state before the projection."""
    config = CLIPTextConfig.from_pretrained(folder)
    return CLIPTextModel.from_pretrained(folder, config=config)
