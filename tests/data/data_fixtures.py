"""Small shard sets with known contents."""

from pathlib import Path

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
