"""What a data set is made of, known before any sample is read, and whether a model can learn from it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from soar_mega.user_files import whole

TEXT_DTYPES = ("float32", "bfloat16", "float16")


class DataError(ValueError):
    """The samples cannot be read on; raised on all ranks alike."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Shapes, buckets and encoders of a data set. A bucket is named by its size in pixels, "WIDTHxHEIGHT"."""

    buckets: dict[str, int]  # name -> samples
    latent_channels: int
    vae_scale_factor: int  # pixels per latent element
    text_shape: tuple[int, int]  # (tokens, width)
    pooled_size: int
    max_sequence_length: int  # T5 tokens among the text tokens
    text_dtype: str  # float32 | bfloat16 | float16
    encoders: dict[str, str]  # part of the pipeline -> fingerprint

    @property
    def samples(self) -> int:
        return sum(self.buckets.values())

    @property
    def largest_bucket(self) -> str:
        """The one with most samples."""
        return max(self.buckets, key=self.buckets.__getitem__)

    def latent_shape(self, bucket: str) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a bucket."""
        width, height = bucket_size(bucket)
        return self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def torch_text_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.text_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any], path: Path) -> "DatasetInfo":
        """From what is written in `path`. ValueError naming the key that is missing or holds something else."""
        text_shape, text_dtype, encoders = (
            values.get(key) for key in ("text_shape", "text_dtype", "encoders")
        )
        if not isinstance(text_shape, list) or len(text_shape) != 2:
            raise ValueError(f"{path}: text_shape is not [tokens, width]: prepare again")
        if text_dtype not in TEXT_DTYPES:
            raise ValueError(f"{path}: text_dtype is not one of {', '.join(TEXT_DTYPES)}: prepare again")
        if not isinstance(encoders, dict):
            raise ValueError(f"{path}: encoders is not an object of fingerprints: prepare again")
        tokens, width = (whole({"text_shape": size}, "text_shape", path) for size in text_shape)
        factor = whole(values, "vae_scale_factor", path)
        return DatasetInfo(
            buckets=_buckets(values.get("buckets"), factor, path),
            latent_channels=whole(values, "latent_channels", path),
            vae_scale_factor=factor,
            text_shape=(tokens, width),
            pooled_size=whole(values, "pooled_size", path),
            max_sequence_length=whole(values, "max_sequence_length", path),
            text_dtype=text_dtype,
            encoders=encoders,
        )


def _buckets(counts: Any, factor: int, path: Path) -> dict[str, int]:
    """Samples per bucket as written in `path`; no bucket is smaller than a latent element."""
    if not isinstance(counts, dict) or not counts:
        raise ValueError(f"{path}: buckets is not an object of sizes and numbers of samples: prepare again")
    for bucket in counts:
        try:
            smallest = min(bucket_size(bucket))
        except ValueError as error:
            raise ValueError(f"{path}: buckets: {error}") from error
        if smallest < factor:
            raise ValueError(f"{path}: buckets: {bucket} is smaller than vae_scale_factor ({factor})")
    return {bucket: whole(counts, bucket, path, most=2**62) for bucket in counts}


def bucket_name(width: int, height: int) -> str:
    return f"{width}x{height}"


def bucket_size(name: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT"; ValueError when it does not read like that."""
    width, cross, height = name.partition("x")
    if not (
        cross
        and name.isascii()
        and width.isdigit()
        and height.isdigit()
        and int(width) > 0
        and int(height) > 0
    ):
        raise ValueError(f"{name!r} is not a bucket; write it as WIDTHxHEIGHT in pixels, for example 512x768")
    return int(width), int(height)
