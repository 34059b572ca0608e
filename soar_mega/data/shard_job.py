"""The items of one shard through the encoders."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.data.captions import Caption
from soar_mega.data.images import ImageError, fit, read_image, to_model_range
from soar_mega.data.info import bucket_size
from soar_mega.data.items import UNREADABLE, Item, Reject
from soar_mega.data.loaded_encoders import Encoders
from soar_mega.data.selection import Chosen
from soar_mega.data.shard_writer import EncodedCaption, EncodedSample, ShardWriter
from soar_mega.data.threads import in_order


@dataclass(frozen=True, kw_only=True)
class _Opened:
    key: str
    item: Item
    pixels: Tensor | None  # [3, H, W] uint8
    problem: tuple[str, str] = ("", "")  # reason, kind


class ShardJob:
    """Encodes the items of one shard and writes them, one bucket after the other.

    So neither the size of a batch nor the number of threads changes which sample is where in the shard.

    Args:
        first_key: number of the first item in the whole source; items are keyed by their number.
    """

    def __init__(
        self, folder: Path, number: int, first_key: int, encoders: Encoders, batch_size: int, threads: int
    ) -> None:
        self._first_key = first_key
        self._encoders = encoders
        self._batch_size = batch_size
        self._threads = threads
        self._writer = ShardWriter(folder, number)
        self._rejects: list[Reject] = []
        self._cut = dict.fromkeys((encoder.facts.part for encoder in encoders.texts), 0)

    def run(self, chosen: Sequence[Chosen], digest: str, advance: Callable[[int], None]) -> None:
        """Write the shard; `advance` is told how many further items are done.

        Args:
            digest: of `chosen`, for the shard's index.
        """
        keyed = [(f"{self._first_key + place:09d}", one) for place, one in enumerate(chosen)]
        keyed.sort(key=lambda pair: pair[1].item.bucket or "")
        for batch in self._batches(in_order(self._threads, _open, keyed), advance):
            self._encode(batch)
        self._writer.close(
            digest=digest,
            captions_cut=self._cut,
            rejects=[asdict(reject) for reject in self._rejects],
        )

    def _batches(self, opened: Iterator[_Opened], advance: Callable[[int], None]) -> Iterator[list[_Opened]]:
        batch: list[_Opened] = []
        done = 0
        for one in opened:
            done += 1
            if one.pixels is None:
                self._reject(one.item, *one.problem)
                continue
            if batch and (len(batch) == self._batch_size or one.item.bucket != batch[0].item.bucket):
                yield batch
                advance(done)
                batch, done = [], 0
            batch.append(one)
        if batch:
            yield batch
        advance(done)

    def _encode(self, batch: Sequence[_Opened]) -> None:
        pixels = torch.stack([one.pixels for one in batch if one.pixels is not None])
        means, stds = self._encoders.encode_images(to_model_range(pixels))
        means, stds = means.cpu(), stds.cpu()  # to the host at once, not sample by sample
        captions = self._encode_captions([caption for one in batch for caption in one.item.captions])
        for row, one in enumerate(batch):
            item = one.item
            assert item.bucket is not None
            first, *further = (next(captions) for _ in item.captions)
            sample = EncodedSample(
                name=item.name,
                bucket=item.bucket,
                latent_mean=means[row],
                latent_std=stds[row],
                caption=first.caption,
                text=first.text,
                pooled=first.pooled,
                weight=first.weight,
                further=further,
            )
            problem = _not_finite(sample)
            if problem:
                self._reject(item, problem, "not finite")
                continue
            self._writer.add(one.key, sample)
            for encoder in self._encoders.texts:
                self._cut[encoder.facts.part] += sum(encoder.cuts(caption.text) for caption in item.captions)

    def _encode_captions(self, captions: Sequence[Caption]) -> Iterator[EncodedCaption]:
        """No more at a time than images."""
        for first in range(0, len(captions), self._batch_size):
            some = captions[first : first + self._batch_size]
            texts, pooled = self._encoders.encode_prompts([caption.text for caption in some])
            for caption, text, vector in zip(some, texts.cpu(), pooled.cpu(), strict=True):
                yield EncodedCaption(caption=caption.text, weight=caption.weight, text=text, pooled=vector)

    def _reject(self, item: Item, reason: str, kind: str) -> None:
        self._rejects.append(Reject(name=item.name, reason=reason, kind=kind))


def _open(keyed: tuple[str, Chosen]) -> _Opened:
    key, item = keyed[0], keyed[1].item
    assert item.bucket is not None
    try:
        with item.image.open() as file:
            content = file.read()
        image = read_image(BytesIO(content))
    except (ImageError, OSError) as error:
        return _Opened(key=key, item=item, pixels=None, problem=(str(error), UNREADABLE))
    if hashlib.sha256(content).hexdigest() != keyed[1].sha256:
        problem = ("was changed while it was prepared: run the same command again", "changed meanwhile")
        return _Opened(key=key, item=item, pixels=None, problem=problem)
    return _Opened(key=key, item=item, pixels=fit(image, *bucket_size(item.bucket), item.mirrored))


def _not_finite(sample: EncodedSample) -> str | None:
    latents_fine = sample.latent_mean.isfinite().all() and sample.latent_std.isfinite().all()
    if not latents_fine:
        return "its latents hold NaN or infinite numbers"
    captions: list[EncodedCaption] = [sample, *sample.further]
    if not all(one.text.isfinite().all() and one.pooled.isfinite().all() for one in captions):
        return "the embeddings of its caption hold NaN or infinite numbers"
    return None
