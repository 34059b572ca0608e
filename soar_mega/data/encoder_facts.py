"""What a pipeline folder says about its encoders without loading them: sizes and lengths."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.data.info import DatasetInfo
from soar_mega.models.family import family_in
from soar_mega.training_facts import read_facts
from soar_mega.user_files import lfs_advice, number, read_object, whole

LARGEST_T5_LENGTH = 512  # of diffusers' pipelines
CLIP_LENGTH = 77  # of a CLIP whose config does not say

# of one encoder: tokens [B, length, width] and pooled [B, P]
TextOutput = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """One text encoder of a pipeline folder, and what is taken of it.

    Attributes:
        part: its folder.
        length: tokens of a prompt.
        read: what its model in transformers returned -> what is taken.
        hidden_states: whether those of all its layers must be among that.
    """

    part: str
    length: int
    read: Callable[[Any], TextOutput]
    hidden_states: bool = False


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Shapes of what the encoders of a pipeline make, and how its text encoders are put together.

    Attributes:
        join: the outputs of `texts`, in their order -> (text [B, S, D], pooled [B, P]).
    """

    latent_channels: int
    vae_scale_factor: int  # pixels per latent element
    size_multiple: int  # width and height of an image must divide by this: VAE factor x patch size
    default_resolution: int  # pixels along an edge, where nobody asks for a size: the transformer's own
    largest_side: int  # pixels; the transformer has no positions beyond
    text_shape: tuple[int, int]  # (tokens, width)
    pooled_size: int
    max_sequence_length: int  # T5 tokens among the text tokens
    texts: tuple[TextPart, ...]
    join: Callable[[Sequence[TextOutput], "EncoderFacts"], tuple[Tensor, Tensor]]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image. ValueError for a size that the model cannot draw."""
        multiple, largest = self.size_multiple, self.largest_side
        if width % multiple or height % multiple or min(width, height) < 1 or max(width, height) > largest:
            raise ValueError(
                f"this pipeline draws multiples of {multiple} up to {largest} pixels, not {width}x{height}"
            )
        return self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def image_size(self, asked: int | Sequence[int] | None) -> tuple[int, int]:
        """(width, height) in pixels: an edge, or both; None: the default one."""
        asked = asked or self.default_resolution
        return (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])

    def dataset_info(
        self, buckets: dict[str, int], text_dtype: torch.dtype, encoders: dict[str, str]
    ) -> DatasetInfo:
        """Of samples that these encoders make.

        Args:
            buckets: name -> samples.
            encoders: their fingerprints.
        """
        return DatasetInfo(
            buckets=buckets,
            latent_channels=self.latent_channels,
            vae_scale_factor=self.vae_scale_factor,
            text_shape=self.text_shape,
            pooled_size=self.pooled_size,
            max_sequence_length=self.max_sequence_length,
            text_dtype=str(text_dtype).removeprefix("torch."),
            encoders=encoders,
        )


def encoder_facts(pipeline_dir: Path, max_sequence_length: int | None = None) -> EncoderFacts:
    """Read the configs of a diffusers pipeline folder.

    Args:
        max_sequence_length: T5 tokens; None takes what the transformer was trained with where the folder says it, else
            what diffusers does, or less where the T5 tokenizer allows less.

    Raises:
        ValueError: a config is missing or damaged, with its path, or the transformer is of no known family.
    """
    path = pipeline_dir / "transformer" / "config.json"
    return family_in(read_config(path), str(path)).encoder_facts(pipeline_dir, max_sequence_length)


def vae_shape(pipeline_dir: Path) -> tuple[int, int]:
    """Channels of the VAE's latents, and how many pixels are one of their elements. ValueError: as above."""
    path = pipeline_dir / "vae" / "config.json"
    vae = read_config(path)
    blocks = vae.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise ValueError(f"{path}: block_out_channels is {blocks!r}, a list of channels is expected")
    return whole(vae, "latent_channels", path), 2 ** (len(blocks) - 1)


def clip_length(pipeline_dir: Path, parts: Sequence[str]) -> int:
    """How many tokens of a prompt CLIPs take: diffusers cuts for all of them at the first one's tokenizer."""
    paths = [pipeline_dir / part / "config.json" for part in parts]
    positions = [
        whole({"max_position_embeddings": CLIP_LENGTH, **read_config(path)}, "max_position_embeddings", path)
        for path in paths
    ]
    path = pipeline_dir / "tokenizer" / "tokenizer_config.json"
    tokenizer = {"model_max_length": CLIP_LENGTH, **read_config(path)}
    return whole(tokenizer, "model_max_length", path, most=min(positions))


def t5_length(pipeline_dir: Path, tokenizer: str, asked: int | None, default: int) -> int:
    """How many tokens of a prompt T5 takes: `asked`, or as in the training that made the folder, or the smaller of
    `default` and what its tokenizer allows."""
    facts = read_facts(pipeline_dir) if asked is None else None
    if facts is not None:
        asked = facts.max_sequence_length
    if asked is not None:
        if not 1 <= asked <= LARGEST_T5_LENGTH:
            raise ValueError(
                f"max_sequence_length is {asked}: it must be between 1 and {LARGEST_T5_LENGTH} T5 tokens"
            )
        return asked
    path = pipeline_dir / tokenizer / "tokenizer_config.json"
    content = read_config(path) if path.is_file() else {}
    if content.get("model_max_length") is None:
        return default
    allowed = number(content, "model_max_length", path)  # 1e30, as many have it, means any length
    if allowed < 1:
        raise ValueError(f"{path}: model_max_length is {allowed}: it must be at least 1")
    return int(min(default, allowed))


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
    return read_object(path, "give a diffusers pipeline folder")
