"""Images of fixed prompts and fixed noise while training: what one looks at first."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from soar_mega.config import LoggingConfig
from soar_mega.data.info import DatasetInfo
from soar_mega.distributed import device, is_rank_zero
from soar_mega.engines import Engine
from soar_mega.evaluation.drift import Velocity
from soar_mega.flow import Schedule, guided, normal, sample
from soar_mega.training.agreement import on_rank_zero

if TYPE_CHECKING:
    from soar_mega.data.encoders import Encoders

SEED = 0  # not the run's: grids of all runs start from the same noise
SMALLEST_SHOWN = 96  # pixels: smaller images are enlarged


class SampleGrid:
    """Prompts encoded once, and images made of them by the weights of the moment.

    Rank 0 encodes and decodes; every rank takes part in sampling, all replicas with the same numbers. The images
    have the size of the data set's largest bucket.

    Args:
        info: of the data set: sizes of latents and text.
        weights: which of the engine's weights are shown.
    """

    def __init__(
        self, pipeline: str, settings: LoggingConfig, info: DatasetInfo, schedule: Schedule, weights: str
    ) -> None:
        self._settings = settings
        self._sigmas = schedule.inference_sigmas(settings.sample_steps)
        self._latent_shape = info.latent_shape(max(info.buckets, key=lambda bucket: info.buckets[bucket]))
        self._weights = weights
        self._encoders: Encoders | None = None
        self._text, self._pooled = on_rank_zero(lambda: self._encode(pipeline, info))

    def _encode(self, pipeline: str, info: DatasetInfo) -> tuple[Tensor, Tensor]:
        from soar_mega.data.encoders import (
            Encoders,
        )  # brings diffusers and transformers, which most runs do not need

        self._encoders = Encoders.from_pipeline(
            pipeline, device(), info.torch_text_dtype(), info.max_sequence_length
        )
        text, pooled = self._encoders.encode_prompts([*self._settings.sample_prompts, ""])
        self._encoders.text_encoders.clear()  # only the decoder is needed from here on
        return text.cpu(), pooled.cpu()

    @torch.no_grad()
    def draw(self, engine: Engine) -> Tensor | None:
        """The grid of all prompts [3, H, W] in [0, 1] on rank 0, None elsewhere. Collective over the world."""
        count = len(self._text) - 1
        start = normal(SEED, "sample", torch.arange(count), 0, self._latent_shape, device())
        cond = self._velocity(engine, self._text[:-1], self._pooled[:-1])
        uncond = self._velocity(
            engine, self._text[-1:].expand(count, -1, -1), self._pooled[-1:].expand(count, -1)
        )
        with engine.using(self._weights):
            latents = sample(guided(cond, uncond, self._settings.sample_guidance_scale), start, self._sigmas)
        if not is_rank_zero():
            return None
        assert self._encoders is not None
        images = self._encoders.decode(latents).cpu()
        enlarged = max(1, SMALLEST_SHOWN // images.shape[-1])
        return grid(images.repeat_interleave(enlarged, dim=-2).repeat_interleave(enlarged, dim=-1))

    def _velocity(self, engine: Engine, text: Tensor, pooled: Tensor) -> Velocity:
        text, pooled = text.to(device()), pooled.to(device())
        return lambda latents, sigma: engine.velocity(latents, sigma, text, pooled)


def grid(images: Tensor, gap: int = 2) -> Tensor:
    """Images [B, 3, h, w] side by side in a nearly square grid with white gaps -> [3, H, W]."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.ones(channels, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def write_png(image: Tensor, path: Path) -> None:
    """Writes an image [3, H, W] in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
