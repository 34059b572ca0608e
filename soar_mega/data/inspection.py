"""What a set of shards holds: buckets, captions and latents, told from some of its samples."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from soar_mega.data.encoder_facts import TextPart, encoder_facts
from soar_mega.data.shards import SampleError, ShardSet, spread
from soar_mega.data.text_encoder import count_tokens, load_tokenizer
from soar_mega.data.vae import Decoder

THUMBNAIL = 256  # pixels a side, of a contact sheet's pictures
QUANTILES = {"shortest": 0.0, "median": 0.5, "p95": 0.95, "longest": 1.0}


@dataclass(kw_only=True)
class LatentStatistics:
    """Of the latents as training draws them: mean + deviation x noise."""

    values: int = 0
    finite: int = 0
    total: float = 0.0
    squares: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, mean: Tensor, std: Tensor) -> None:
        """The latents of one sample: means and deviations [C, H, W]."""
        fine = mean.isfinite() & std.isfinite()
        mean, std = mean[fine].double(), std[fine].double()
        self.values += fine.numel()
        self.finite += len(mean)
        self.total += mean.sum().item()
        self.squares += (mean.square() + std.square()).sum().item()

    def to_json(self) -> dict[str, Any]:
        """mean, std and the share of numbers that are NaN or infinite; no mean where there is nothing finite."""
        mean = self.total / self.finite if self.finite else None
        std = math.sqrt(max(0.0, self.squares / self.finite - mean**2)) if mean is not None else None
        not_finite = 1 - self.finite / self.values if self.values else 0.0
        return {"mean": mean, "std": std, "not_finite": not_finite, "unreadable": self.failures}


def inspect(shards: ShardSet, samples: int, pipeline_dir: str = "") -> dict[str, Any]:
    """What a set holds, as JSON; statistics are of at most `samples` samples, in each bucket as its share asks.

    Args:
        pipeline_dir: its tokenizers count the captions' tokens; "" counts characters alone.
    """
    info = shards.info
    tokenizers = _tokenizers(Path(pipeline_dir), info.max_sequence_length) if pipeline_dir else []
    latents, captions, looked_at = {}, list[str](), 0
    for bucket, count in info.buckets.items():
        statistics = LatentStatistics()
        for index in spread(shards.members(bucket), math.ceil(samples * count / info.samples)):
            looked_at += 1
            captions += shards.captions(index)
            try:
                stored = shards.stored("latents", index)
                statistics.add(stored["mean"], stored["std"])
            except SampleError as error:
                statistics.failures.append(f"{shards.names([index])[0]}: {error}")
        latents[bucket] = statistics.to_json()
    return {
        "path": str(shards.path),
        "samples": info.samples,
        "shards": shards.shard_count,
        "bytes": shards.total_bytes,
        "looked_at": looked_at,
        "buckets": {
            bucket: {"samples": count, "latents": latents[bucket]} for bucket, count in info.buckets.items()
        },
        "captions": {
            "count": len(captions),
            "empty": sum(not caption.strip() for caption in captions),
            "characters": _lengths(map(len, captions)),
            "tokens": {facts.part: _tokens(facts, tokenizer, captions) for facts, tokenizer in tokenizers},
        },
        "captions_cut": shards.captions_cut,
    }


def contact_sheet(shards: ShardSet, decoder: Decoder, count: int) -> tuple[Tensor, list[str]]:
    """Pictures decoded from the means of the latents of some samples, spread over the set.

    Returns:
        A sheet [3, H, W] in [0, 1], row by row, and the names of the samples on it in that order.
    """
    pictures, names = [], []
    for index in spread(range(len(shards)), count):
        try:
            mean = shards.stored("latents", index)["mean"]
        except SampleError:
            continue
        pictures.append(_thumbnail(decoder.decode(mean[None])))
        names.append(shards.names([index])[0])
    if not pictures:
        raise ValueError(f"no sample of {shards.path} can be read: there is nothing to show")
    cell = [max(picture.shape[axis] for picture in pictures) + 2 for axis in (1, 2)]
    columns = math.ceil(math.sqrt(len(pictures)))
    sheet = torch.ones(3, -(-len(pictures) // columns) * cell[0], columns * cell[1])
    for place, picture in enumerate(pictures):
        top, left = place // columns * cell[0], place % columns * cell[1]
        sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return sheet, names


def _thumbnail(image: Tensor) -> Tensor:
    """An image [1, 3, H, W], no side of it longer than a thumbnail's -> [3, h, w]."""
    scale = THUMBNAIL / max(image.shape[-2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        image = interpolate(image, size=size, mode="bilinear", antialias=True)
    return image[0].nan_to_num().clamp(0, 1)


def _tokenizers(pipeline_dir: Path, max_sequence_length: int) -> list[tuple[TextPart, Any]]:
    """Of the text encoders of a pipeline folder, and what each of these takes. ValueError: one cannot be loaded."""
    texts = encoder_facts(pipeline_dir, max_sequence_length).texts
    return [(facts, load_tokenizer(pipeline_dir, facts)) for facts in texts]


def _tokens(facts: TextPart, tokenizer: Any, captions: Sequence[str]) -> dict[str, Any]:
    lengths = [count_tokens(tokenizer, caption) for caption in captions]
    cut = sum(length > facts.length for length in lengths)
    return {**_lengths(lengths), "window": facts.length, "cut": cut}


def _lengths(lengths: Iterable[int]) -> dict[str, int]:
    """Some quantiles; each is one of the lengths."""
    ordered = sorted(lengths)
    return {name: ordered[round(at * (len(ordered) - 1))] for name, at in QUANTILES.items()}
