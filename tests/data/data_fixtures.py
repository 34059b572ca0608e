"""Small shard sets with known contents."""

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from soar_mega.data.info import DatasetInfo, bucket_name
from soar_mega.data.shard_writer import EMPTY_FILE, EncodedSample, ShardWriter, write_dataset_file

CHANNELS, FACTOR, TEXT, POOLED = 4, 2, (5, 8), 6


def make_sample(index: int, size: tuple[int, int] = (16, 16)) -> EncodedSample:
    """A sample whose tensors name it: all of its latent means are `index`, the deviations zero."""
    shape = (CHANNELS, size[1] // FACTOR, size[0] // FACTOR)
    return EncodedSample(
        name=f"image{index}.png",
        caption=f"caption {index}",
        bucket=bucket_name(*size),
        latent_mean=torch.full(shape, float(index)),
        latent_std=torch.zeros(shape),
        text=torch.full(TEXT, float(index)),
        pooled=torch.full((POOLED,), float(index)),
    )


def make_samples(count: int) -> list[EncodedSample]:
    """In two buckets; their latents have a deviation, so that they are drawn."""
    samples = [make_sample(i, (16, 16) if i % 3 else (12, 20)) for i in range(count)]
    for sample in samples:
        sample.latent_std.fill_(0.5)
    return samples


def make_shards(folder: Path, samples: list[EncodedSample], per_shard: int = 4, **changes: object) -> Path:
    """A finished shard set of the samples; `changes` go into its dataset file."""
    folder.mkdir(parents=True)
    numbers = range(0, len(samples), per_shard)
    for number, first in enumerate(numbers):
        writer = ShardWriter(folder, number)
        for index in range(first, min(first + per_shard, len(samples))):
            writer.add(f"{index:09d}", samples[index])
        writer.close()
    save_file({"text": torch.full(TEXT, -1.0), "pooled": torch.full((POOLED,), -1.0)}, folder / EMPTY_FILE)
    names = [sample.bucket for sample in samples]
    info = DatasetInfo(
        buckets={name: names.count(name) for name in dict.fromkeys(names)},
        latent_channels=CHANNELS,
        vae_scale_factor=FACTOR,
        text_shape=TEXT,
        pooled_size=POOLED,
        max_sequence_length=2,
        text_dtype="float32",
        encoders={},
    )
    write_dataset_file(folder, info, len(numbers), **changes)
    return folder


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes, **attributes: Any) -> None:
    """As a member of this name, with these attributes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, BytesIO(content))
