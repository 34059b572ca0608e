"""What a data set is made of, known before any sample is read, and whether a model can learn from it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch


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
    def from_json(values: dict[str, Any]) -> "DatasetInfo":
        names = DatasetInfo.__dataclass_fields__
        known = {name: values[name] for name in names}
        return DatasetInfo(**{**known, "text_shape": tuple(values["text_shape"])})


def bucket_name(width: int, height: int) -> str:
    return f"{width}x{height}"


def bucket_size(name: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT"; ValueError when it does not read like that."""
    width, cross, height = name.partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0):
        raise ValueError(f"{name!r} is not a bucket; write it as WIDTHxHEIGHT in pixels, for example 512x768")
    return int(width), int(height)
