"""What a pipeline folder says about its encoders without loading them: sizes and lengths."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.user_files import lfs_advice, number, read_object, whole

DEFAULT_T5_LENGTH = 256  # of diffusers' StableDiffusion3Pipeline
LARGEST_T5_LENGTH = 512  # likewise
CLIP_LENGTH = 77  # of a CLIP whose config does not say


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


def encoder_facts(pipeline_dir: Path, max_sequence_length: int | None = None) -> EncoderFacts:
    """Read the configs of a diffusers SD3 pipeline folder.

    Args:
        max_sequence_length: T5 tokens; None takes the smaller of 256 and what the T5 tokenizer allows.

    Raises:
        ValueError: a config is missing or damaged, with its path.
    """
    vae_path, path = pipeline_dir / "vae" / "config.json", pipeline_dir / "transformer" / "config.json"
    vae, transformer = read_config(vae_path), read_config(path)
    pooled_size, clip_length = _clips(pipeline_dir)
    width = whole(transformer, "joint_attention_dim", path)
    if has_t5(pipeline_dir):
        t5_path = pipeline_dir / "text_encoder_3" / "config.json"
        width = whole(read_config(t5_path), "d_model", t5_path)
    t5_length = _t5_length(pipeline_dir, max_sequence_length)
    blocks = vae.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise ValueError(f"{vae_path}: block_out_channels is {blocks!r}, a list of channels is expected")
    factor = 2 ** (len(blocks) - 1)
    multiple = factor * whole(transformer, "patch_size", path)
    return EncoderFacts(
        latent_channels=whole(vae, "latent_channels", vae_path),
        vae_scale_factor=factor,
        size_multiple=multiple,
        default_resolution=whole(transformer, "sample_size", path) * factor,
        largest_side=whole(transformer, "pos_embed_max_size", path) * multiple,
        text_shape=(clip_length + t5_length, width),
        pooled_size=pooled_size,
        max_sequence_length=t5_length,
    )


def has_t5(pipeline_dir: Path) -> bool:
    """Whether the pipeline has a T5; model_index.json with [null, null] for text_encoder_3 means that it has none."""
    return class_name(pipeline_dir, "text_encoder_3") is not None


def class_name(pipeline_dir: Path, part: str) -> str | None:
    """The class of a part as model_index.json names it; None where the pipeline does without that part.

    ValueError where the entry is neither [library, class] nor [null, null].
    """
    path = pipeline_dir / "model_index.json"
    entry = read_config(path).get(part)
    if entry is None or entry == [None, None]:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise ValueError(f"{path}: {part} is {entry!r}, [library, class] is expected")
    return entry[1]


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Whatever a library raises while it loads an encoder from `folder` becomes a ValueError that names the folder."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(folder.parent) in str(error):
            raise
        pointers = [advice for file in sorted(folder.glob("*")) if (advice := lfs_advice(file))]
        why = pointers[0] if pointers else f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} cannot be loaded: {why}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON config of a pipeline folder; ValueError naming it when it is missing or damaged."""
    return read_object(path, "give a diffusers SD3 pipeline folder")


def _clips(pipeline_dir: Path) -> tuple[int, int]:
    """Width of the pooled embeddings of both CLIPs together, and how many tokens of a prompt they take."""
    paths = [pipeline_dir / part / "config.json" for part in ("text_encoder", "text_encoder_2")]
    clips = [read_config(path) for path in paths]
    positions = [
        whole({"max_position_embeddings": CLIP_LENGTH, **clip}, "max_position_embeddings", path)
        for clip, path in zip(clips, paths, strict=True)
    ]
    path = pipeline_dir / "tokenizer" / "tokenizer_config.json"
    tokenizer = {"model_max_length": CLIP_LENGTH, **read_config(path)}
    length = whole(tokenizer, "model_max_length", path, most=min(positions))
    return sum(whole(clip, "projection_dim", path) for clip, path in zip(clips, paths, strict=True)), length


def _t5_length(pipeline_dir: Path, asked: int | None) -> int:
    if asked is not None:
        if not 1 <= asked <= LARGEST_T5_LENGTH:
            raise ValueError(
                f"max_sequence_length is {asked}: it must be between 1 and {LARGEST_T5_LENGTH} T5 tokens"
            )
        return asked
    path = pipeline_dir / "tokenizer_3" / "tokenizer_config.json"
    tokenizer = read_config(path) if path.is_file() else {}
    if tokenizer.get("model_max_length") is None:
        return DEFAULT_T5_LENGTH
    allowed = number(tokenizer, "model_max_length", path)  # 1e30, as many have it, means any length
    if allowed < 1:
        raise ValueError(f"{path}: model_max_length is {allowed}: it must be at least 1")
    return int(min(DEFAULT_T5_LENGTH, allowed))
