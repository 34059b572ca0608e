"""Images that are encoded while training: the same samples, order and draws as shards of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soar_mega import distributed
from soar_mega.data.buckets import generate_buckets, nearest_bucket
from soar_mega.data.captions import drawn
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.image_sources import list_items
from soar_mega.data.images import ImageError, fit, image_size, read_image, to_model_range
from soar_mega.data.info import bucket_size
from soar_mega.data.loaded_encoders import Encoders
from soar_mega.data.shards import Read
from soar_mega.flow import normal

NAMED = 5


class OnlineImages:
    """A source of samples over a folder of captioned images.

    Reader processes open the images; the training process runs the encoders. All images must be usable: leaving some
    out is decided when shards are prepared, not while training.

    Args:
        text: whether captions are encoded here too (first pipeline stage) or images only (last).
    """

    def __init__(self, path: str, pipeline_dir: str, text: bool) -> None:
        if not Path(path).is_dir():
            raise ValueError(f"data.path {path!r} is not a folder of images, which data.encode=online needs")
        if not pipeline_dir:
            raise ValueError("data.encode=online needs model.pipeline_dir, the folder with the encoders")
        self._pipeline = Path(pipeline_dir)
        facts = encoder_facts(self._pipeline)
        self._items, rejects = list_items(Path(path))
        choice = generate_buckets(facts.default_resolution, facts.size_multiple, facts.largest_side)
        of_images: list[str] = []  # their buckets
        problems = [f"{reject.name}: {reject.reason}" for reject in rejects]
        for item in self._items:
            try:
                with item.image.open() as file:
                    of_images.append(item.bucket or nearest_bucket(*image_size(file), choice))
            except ImageError as error:
                problems.append(f"{item.name}: {error}")
        if problems:
            raise ValueError(
                f"{len(problems)} samples of {path} cannot be used: {'; '.join(problems[:NAMED])}. Repair or remove "
                "them, or write shards with `soar-mega prepare --skip-invalid`"
            )
        self._text = text
        self._encoders: Encoders | None = None
        self._members = {b: np.flatnonzero(np.array(of_images) == b) for b in dict.fromkeys(of_images)}
        buckets = {bucket: len(members) for bucket, members in self._members.items()}
        self.info = facts.dataset_info(buckets, torch.float32, fingerprints(self._pipeline))

    def open(self) -> None:
        """Load the encoders, on this process's device."""
        self._encoders = Encoders.from_pipeline(
            self._pipeline,
            distributed.device(),
            torch.float32,
            self.info.max_sequence_length,
            text=self._text,
        )

    def members(self, bucket: str) -> NDArray[np.int64]:
        """Indices of the images of a bucket, in source order."""
        return self._members[bucket]

    def read(self, bucket: str, indices: Sequence[int], positions: Tensor, seed: int, text: bool) -> Read:
        """Images [B, 3, H, W] uint8 in the bucket's size."""
        width, height = bucket_size(bucket)
        images = torch.zeros(len(indices), 3, height, width, dtype=torch.uint8)
        names = [self._items[i].name for i in indices]
        result = Read(tensors={"images": images}, names=names, indices=indices)
        for row, index in enumerate(indices):
            try:
                with self._items[index].image.open() as file:
                    images[row] = fit(read_image(file), width, height)
            except ImageError as error:
                result.failures[row] = str(error)
        return result

    def finish(self, read: Read, positions: Tensor, seed: int, text: bool) -> Read:
        """Encode: images to latents drawn at `positions`, and the captions where `text`."""
        assert self._encoders is not None
        mean, std = self._encoders.encode_images(to_model_range(read.tensors["images"]))
        noise = normal(seed, "vae", positions, 0, mean.shape[1:], device=mean.device)
        tensors = {"latents": mean + std * noise}
        if text:
            captions = [
                self._caption(int(i), positions[row : row + 1], seed) for row, i in enumerate(read.indices)
            ]
            tensors["text"], tensors["pooled"] = self._encoders.encode_prompts(captions)
        # A failed image is black; its latents must not be learnt from, and are not.
        return replace(read, tensors=tensors)

    def _caption(self, index: int, position: Tensor, seed: int) -> str:
        captions = self._items[index].captions
        return captions[drawn([caption.weight for caption in captions], seed, position)].text

    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """text [S, D] and pooled [P] of the empty prompt."""
        assert self._encoders is not None
        text, pooled = self._encoders.encode_prompts([""])
        return text[0], pooled[0]
