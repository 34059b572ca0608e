"""What the encoders of a StableDiffusion3Pipeline make of images and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soar_mega.data.encoder_facts import (
    EncoderFacts,
    TextOutput,
    TextPart,
    class_name,
    clip_length,
    read_config,
    t5_length,
    vae_shape,
)
from soar_mega.user_files import whole

CLIPS = ("text_encoder", "text_encoder_2")
T5, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"
DEFAULT_T5_LENGTH = 256  # of diffusers


def encoder_facts(pipeline_dir: Path, max_sequence_length: int | None = None) -> EncoderFacts:
    """Two CLIPs, in most pipelines a T5, and the sizes of the transformer that say what images it can draw.

    Raises:
        ValueError: a config is missing or damaged, with its path.
    """
    path = pipeline_dir / "transformer" / "config.json"
    transformer = read_config(path)
    channels, factor = vae_shape(pipeline_dir)
    clip_tokens = clip_length(pipeline_dir, CLIPS)
    t5_tokens = t5_length(pipeline_dir, T5_TOKENIZER, max_sequence_length, DEFAULT_T5_LENGTH)
    width = whole(transformer, "joint_attention_dim", path)
    texts = [TextPart(part=part, length=clip_tokens, read=_of_clip, hidden_states=True) for part in CLIPS]
    if class_name(pipeline_dir, T5) is not None:
        t5_path = pipeline_dir / T5 / "config.json"
        width = whole(read_config(t5_path), "d_model", t5_path)
        texts.append(TextPart(part=T5, length=t5_tokens, read=_of_t5))
    multiple = factor * whole(transformer, "patch_size", path)
    return EncoderFacts(
        latent_channels=channels,
        vae_scale_factor=factor,
        size_multiple=multiple,
        default_resolution=whole(transformer, "sample_size", path) * factor,
        largest_side=whole(transformer, "pos_embed_max_size", path) * multiple,
        text_shape=(clip_tokens + t5_tokens, width),
        pooled_size=sum(_projection(pipeline_dir / part / "config.json") for part in CLIPS),
        max_sequence_length=t5_tokens,
        texts=tuple(texts),
        join=join,
    )


def join(outputs: Sequence[TextOutput], facts: EncoderFacts) -> tuple[Tensor, Tensor]:
    """-> (text [B, S, D], pooled [B, P]), as StableDiffusion3Pipeline.encode_prompt makes them.

    The two CLIPs' last hidden states but one side by side, padded with zeros to T5's width, then T5's tokens (zeros
    where the pipeline has no T5); pooled are both CLIPs' projections.
    """
    tokens = [of_tokens for of_tokens, _ in outputs if of_tokens is not None]
    clip, t5 = torch.cat(tokens[: len(CLIPS)], dim=-1), tokens[len(CLIPS) :]
    if not t5:
        t5 = [clip.new_zeros(len(clip), facts.max_sequence_length, facts.text_shape[1])]
    clip = F.pad(clip, (0, t5[0].shape[-1] - clip.shape[-1]))
    pooled = torch.cat([of_prompts for _, of_prompts in outputs if of_prompts is not None], dim=-1)
    return torch.cat([clip, *t5], dim=-2), pooled


def _of_clip(output: Any) -> TextOutput:
    return output.hidden_states[-2], output[0]


def _of_t5(output: Any) -> TextOutput:
    return output[0], None


def _projection(path: Path) -> int:
    return whole(read_config(path), "projection_dim", path)
