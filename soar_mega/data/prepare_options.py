"""What a user may say about a `prepare` beside the sources, the folder and the pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from soar_mega.data.buckets import check_buckets, generate_buckets
from soar_mega.data.encoder_facts import EncoderFacts
from soar_mega.data.selection import Wishes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How images are encoded.

    Attributes:
        images, score_key: see `image_sources.list_items`.
        buckets: sizes "WIDTHxHEIGHT" to choose from; empty generates them from `resolution`, the edge of the square one
            (None: the transformer's own sample size). A size that the source gives is taken as it is.
        bucket_count: how many of these to use at most, those that fit the images best; None: all.
        min_bucket: images that a bucket must hold; those of smaller ones go to the nearest that is left.
        wishes: which images are taken, held out for validation (in a folder of their own) and mirrored.
        skip_invalid: finish without the samples that cannot be used, instead of failing.
        max_sequence_length: T5 tokens; None takes the smaller of 256 and what the T5 tokenizer allows.
        dtype: fp32 | bf16, of the text encoders and their embeddings.
        batch_size: images per forward of the encoders. It may change between calls; latents differ by rounding then.
        threads: of each process, that read and decode images.
    """

    images: Path | None = None
    buckets: Sequence[str] = ()
    resolution: int | None = None
    bucket_count: int | None = None
    min_bucket: int = 0
    wishes: Wishes = Wishes()
    score_key: str = "score"
    skip_invalid: bool = False
    max_sequence_length: int | None = None
    dtype: str = "fp32"
    batch_size: int = 8
    samples_per_shard: int = 1000
    threads: int = 4

    def check(self) -> None:
        """ValueError naming an option that cannot be."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("batch_size", "samples_per_shard", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.bucket_count is not None and self.bucket_count < 1:
            raise ValueError(f"bucket_count is {self.bucket_count}: it must be at least 1")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}: it must be at least 1 pixel")
        self.wishes.check()

    def possible_buckets(self, facts: EncoderFacts) -> list[str]:
        """The buckets to choose from. ValueError naming one that the model cannot take."""
        if self.buckets:
            return check_buckets(self.buckets, facts.size_multiple, facts.largest_side)
        resolution = self.resolution or facts.default_resolution
        return generate_buckets(resolution, facts.size_multiple, facts.largest_side)
