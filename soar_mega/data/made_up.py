"""Shards of keyed noise in place of encoded images: the same numbers with every version of a library."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from soar_mega.data.info import DatasetInfo
from soar_mega.data.shard_writer import EMPTY_FILE, EncodedSample, ShardWriter, write_dataset_file
from soar_mega.flow import normal


def write_made_up_shards(
    folder: Path, info: DatasetInfo, seed: int, factors: Mapping[int, float] | None = None
) -> None:
    """Writes one shard into a new folder: the samples of `info`, bucket after bucket.

    Args:
        factors: on the latents of some samples, by their number.
    """
    folder.mkdir(parents=True)
    bucket_of = [bucket for bucket, count in info.buckets.items() for _ in range(count)]
    position = torch.arange(info.samples + 1)  # the last is the empty prompt's
    latents = {
        bucket: normal(seed, "latents", position, 0, info.latent_shape(bucket)) for bucket in info.buckets
    }
    text = normal(seed, "text", position, 0, info.text_shape).to(info.torch_text_dtype())
    pooled = normal(seed, "pooled", position, 0, (info.pooled_size,)).to(info.torch_text_dtype())
    writer = ShardWriter(folder, 0)
    for i, bucket in enumerate(bucket_of):
        sample = EncodedSample(
            name=f"made-up {i}",
            caption=f"number {i}",
            bucket=bucket,
            latent_mean=latents[bucket][i] * (factors or {}).get(i, 1.0),
            latent_std=torch.full(info.latent_shape(bucket), 0.1),
            text=text[i],
            pooled=pooled[i],
        )
        writer.add(f"{i:06d}", sample)
    writer.close()
    empty = save({"text": text[-1].clone(), "pooled": pooled[-1].clone()})
    (folder / EMPTY_FILE).write_bytes(empty)  # not save_file, which leaves out the umask
    write_dataset_file(folder, info, 1)
