"""What the encoders of a FluxPipeline make of images and prompts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from soar_mega.data.encoder_facts import (
    EncoderFacts,
    TextOutput,
    TextPart,
    clip_length,
    read_config,
    t5_length,
    vae_shape,
)
from soar_mega.models.flux.sizes import PATCH
from soar_mega.training_facts import read_facts
from soar_mega.user_files import whole

CLIP, T5, T5_TOKENIZER = "text_encoder", "text_encoder_2", "tokenizer_2"
DEFAULT_T5_LENGTH = 512  # of diffusers
SAMPLE_SIZE = 128  # likewise: the side of the latents that it makes where nothing is asked for
LARGEST_SIDE = 2**16  # pixels; angles, which rotary positions are, have no end


def encoder_facts(pipeline_dir: Path, max_sequence_length: int | None = None) -> EncoderFacts:
    """A CLIP, of which only the pooled vector is used, and a T5.

    Raises:
        ValueError: a config is missing or damaged, with its path.
    """
    channels, factor = vae_shape(pipeline_dir)
    t5_tokens = t5_length(pipeline_dir, T5_TOKENIZER, max_sequence_length, DEFAULT_T5_LENGTH)
    clip_path, t5_path = (pipeline_dir / part / "config.json" for part in (CLIP, T5))
    return EncoderFacts(
        latent_channels=channels,
        vae_scale_factor=factor,
        size_multiple=factor * PATCH,
        default_resolution=_default_side(pipeline_dir, factor),
        largest_side=LARGEST_SIDE,
        text_shape=(t5_tokens, whole(read_config(t5_path), "d_model", t5_path)),
        pooled_size=whole(read_config(clip_path), "hidden_size", clip_path),
        max_sequence_length=t5_tokens,
        texts=(
            TextPart(part=CLIP, length=clip_length(pipeline_dir, [CLIP]), read=_of_clip),
            TextPart(part=T5, length=t5_tokens, read=_of_t5),
        ),
        join=join,
    )


def _default_side(pipeline_dir: Path, factor: int) -> int:
    """In pixels. The transformer names none: of an export it is that of its training, else diffusers'."""
    facts = read_facts(pipeline_dir)
    if facts is None or facts.width is None or facts.height is None:
        return SAMPLE_SIZE * factor
    multiple = factor * PATCH
    return multiple * max(1, round(math.sqrt(facts.width * facts.height) / multiple))


def join(outputs: Sequence[TextOutput], facts: EncoderFacts) -> tuple[Tensor, Tensor]:
    """-> (text [B, S, D], pooled [B, P]), as FluxPipeline.encode_prompt makes them."""
    (_, pooled), (text, _) = outputs
    assert text is not None and pooled is not None
    return text, pooled


def _of_clip(output: Any) -> TextOutput:
    return None, output.pooler_output


def _of_t5(output: Any) -> TextOutput:
    return output[0], None
