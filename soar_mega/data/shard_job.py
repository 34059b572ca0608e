"""The items of one shard through the encoders."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from soar_mega.data.buckets import bucket_problem, nearest_bucket
from soar_mega.data.encoders import Encoders
from soar_mega.data.image_sources import Item, Reject
from soar_mega.data.images import ImageError, fit, read_image, to_model_range
from soar_mega.data.info import bucket_size
from soar_mega.data.item_digests import contents
from soar_mega.data.shard_writer import EncodedSample, ShardWriter


class ShardJob:
    """Encodes the items of one shard in batches of one bucket and writes them.

    Args:
        first_key: number of the first item in the whole source; items are keyed by their number.
        settings: buckets to choose from and batch_size.
    """

    def __init__(
        self, folder: Path, number: int, first_key: int, encoders: Encoders, settings: dict[str, Any]
    ) -> None:
        self._first_key = first_key
        self._encoders = encoders
        self._settings = settings
        self._writer = ShardWriter(folder, number)
        self._waiting: dict[str, list[tuple[str, Item, torch.Tensor]]] = {}
        self._rejects: list[Reject] = []
        self._cut = dict.fromkeys((encoder.facts.part for encoder in encoders.texts), 0)

    def run(self, chunk: Sequence[Item], digest: str, progress: Any) -> list[Reject]:
        """Write the shard; what could not be used of it."""
        images = contents(chunk)  # before they are encoded: a change meanwhile is seen by the next call
        for place, item in enumerate(chunk):
            self._take(f"{self._first_key + place:09d}", item)
            progress.update()
        for bucket in self._waiting:
            self._encode(bucket)
        self._writer.close(
            digest=digest,
            images=images,
            captions_cut=self._cut,
            rejects=[asdict(reject) for reject in self._rejects],
        )
        return self._rejects

    def _take(self, key: str, item: Item) -> None:
        facts = self._encoders.facts
        bucket = item.bucket
        try:
            image = read_image(item.image)
        except ImageError as error:
            self._rejects.append(Reject(name=item.name, reason=str(error)))
            return
        if bucket is None:
            bucket = nearest_bucket(*image.size, self._settings["buckets"])
        problem = bucket_problem(bucket, facts.size_multiple, facts.largest_side)
        if problem:
            self._rejects.append(Reject(name=item.name, reason=problem))
            return
        pixels = fit(image, *bucket_size(bucket), item.mirrored)
        self._waiting.setdefault(bucket, []).append((key, item, pixels))
        if len(self._waiting[bucket]) == self._settings["batch_size"]:
            self._encode(bucket)

    def _encode(self, bucket: str) -> None:
        batch, self._waiting[bucket] = self._waiting[bucket], []
        if not batch:
            return
        means, stds = self._encoders.encode_images(
            to_model_range(torch.stack([pixels for _, _, pixels in batch]))
        )
        texts, pooled = self._encoders.encode_prompts([item.caption for _, item, _ in batch])
        for row, (key, item, _) in enumerate(batch):
            sample = EncodedSample(
                name=item.name,
                caption=item.caption,
                bucket=bucket,
                latent_mean=means[row].cpu(),
                latent_std=stds[row].cpu(),
                text=texts[row].cpu(),
                pooled=pooled[row].cpu(),
            )
            problem = _not_finite(sample)
            if problem:
                self._rejects.append(Reject(name=item.name, reason=problem))
            else:
                self._writer.add(key, sample)
                for encoder in self._encoders.texts:
                    self._cut[encoder.facts.part] += encoder.cuts(item.caption)


def _not_finite(sample: EncodedSample) -> str | None:
    latents_fine = sample.latent_mean.isfinite().all() and sample.latent_std.isfinite().all()
    if not latents_fine:
        return "its latents hold NaN or infinite numbers"
    if not (sample.text.isfinite().all() and sample.pooled.isfinite().all()):
        return "the embeddings of its caption hold NaN or infinite numbers"
    return None
