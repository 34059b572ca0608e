"""What a pipeline folder says about its encoders without loading them: sizes and lengths."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_T5_LENGTH = 256  # of diffusers' StableDiffusion3Pipeline


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Shapes of what the encoders of a pipeline make."""

    latent_channels: int
    vae_scale_factor: int  # pixels per latent element
    size_multiple: int  # width and height of an image must divide by this: VAE factor x patch size
    default_resolution: int  # pixels along an edge of the transformer's own sample size
    largest_side: int  # pixels; the transformer has no positions beyond
    text_shape: tuple[int, int]  # (tokens, width)
    pooled_size: int
    max_sequence_length: int  # T5 tokens among the text tokens


def encoder_facts(pipeline: Path, max_sequence_length: int | None = None) -> EncoderFacts:
    """Read the configs of a diffusers SD3 pipeline folder.

    Args:
        max_sequence_length: T5 tokens; None takes the smaller of 256 and what the T5 tokenizer allows.

    Raises:
        ValueError: a config is missing or damaged, with its path.
    """
    vae = read_config(pipeline / "vae" / "config.json")
    transformer = read_config(pipeline / "transformer" / "config.json")
    clips = [read_config(pipeline / part / "config.json") for part in ("text_encoder", "text_encoder_2")]
    clip_length = read_config(pipeline / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    width = transformer["joint_attention_dim"]
    if has_t5(pipeline):
        width = read_config(pipeline / "text_encoder_3" / "config.json")["d_model"]
    t5_length = max_sequence_length or _default_t5_length(pipeline)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = factor * transformer["patch_size"]
    return EncoderFacts(
        latent_channels=vae["latent_channels"],
        vae_scale_factor=factor,
        size_multiple=multiple,
        default_resolution=transformer["sample_size"] * factor,
        largest_side=transformer["pos_embed_max_size"] * multiple,
        text_shape=(clip_length + t5_length, width),
        pooled_size=sum(clip["projection_dim"] for clip in clips),
        max_sequence_length=t5_length,
    )


def has_t5(pipeline: Path) -> bool:
    """Whether the pipeline has a T5; model_index.json with [null, null] for text_encoder_3 means that it has none."""
    entry = read_config(pipeline / "model_index.json").get("text_encoder_3")
    return bool(entry and entry[1])


def read_config(path: Path) -> dict[str, Any]:
    """A JSON config of a pipeline folder; ValueError naming it when it is missing or damaged."""
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a diffusers SD3 pipeline folder"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    assert isinstance(config, dict)
    return config


def _default_t5_length(pipeline: Path) -> int:
    path = pipeline / "tokenizer_3" / "tokenizer_config.json"
    allowed = read_config(path).get("model_max_length") if path.is_file() else None
    return int(min(DEFAULT_T5_LENGTH, allowed or DEFAULT_T5_LENGTH))
