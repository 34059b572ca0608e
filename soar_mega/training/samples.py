"""Images of fixed prompts and fixed noise while training: what one looks at first."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soar_mega.config import LoggingConfig, Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.data.prompts import EncodedPrompts, encode_prompts
from soar_mega.distributed import device, is_rank_zero
from soar_mega.engines import Engine
from soar_mega.evaluation.drift import at_scale
from soar_mega.evaluation.pictures import to_pil
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.flow import Schedule, normal, sample
from soar_mega.models.common.conditions import Conditions

if TYPE_CHECKING:
    from soar_mega.data.vae import Decoder

SEED = 0  # not the run's: grids of all runs start from the same noise
SMALLEST_SHOWN = 96  # pixels: smaller images are enlarged


def encode_sample_prompts(recipe: Recipe, info: DatasetInfo) -> EncodedPrompts | None:
    """The prompts of a run's sample grids, encoded by rank 0; None where it draws none. Collective over the world.

    No encoder is left on return, so this should come before the engine takes the device's memory.

    Args:
        info: of the data set: length and type of its text.
    """
    if not recipe.logging.sample_interval:
        return None
    dtype, length = info.torch_text_dtype(), info.max_sequence_length
    return on_rank_zero(
        lambda: encode_prompts(recipe.model.pipeline_dir, recipe.logging.sample_prompts, dtype, length)
    )


class FixedNoise:
    """What an engine draws from noise that is the same in all runs, in the size of the largest bucket.

    Args:
        info: of the data set: sizes of latents.
    """

    def __init__(self, settings: LoggingConfig, info: DatasetInfo, schedule: Schedule) -> None:
        self._guidance_scale = settings.sample_guidance_scale
        self._sigmas = schedule.inference_sigmas(settings.sample_steps)
        self._latent_shape = info.latent_shape(info.largest_bucket)

    def draw(
        self,
        engine: Engine,
        asked: Conditions,
        empty: Conditions,
        numbers: Tensor,
        micro_batch_size: int | None = None,
    ) -> Tensor:
        """Latents [B, C, H, W] of prompts [B], whose `numbers` [B] int64 key their noise.

        Args:
            empty: of the empty prompt, [1].
            micro_batch_size: as `Engine.velocity` takes it.
        """
        asked, empty = (c.map(lambda tensor: tensor.to(device())) for c in (asked, empty))
        is_told = engine.model.sizes.guidance_embeds
        velocity = partial(engine.velocity, micro_batch_size=micro_batch_size)
        guided = at_scale(velocity, asked, empty, self._guidance_scale, is_told)
        start = normal(SEED, "sample", numbers, 0, self._latent_shape, device())
        return sample(guided, start, self._sigmas)


class SampleGrid:
    """Images that the weights of the moment make of prompts.

    Every rank takes part in sampling, all replicas with the same numbers; rank 0 decodes. The images have the size of
    the data set's largest bucket.

    Args:
        info: of the data set: sizes of latents.
        weights: which of the engine's weights are shown.
    """

    def __init__(
        self,
        pipeline_dir: str,
        prompts: EncodedPrompts,
        settings: LoggingConfig,
        info: DatasetInfo,
        schedule: Schedule,
        weights: str,
    ) -> None:
        self._prompts, self._noise = prompts, FixedNoise(settings, info, schedule)
        self._weights = weights
        self._decoder: Decoder | None = None
        on_rank_zero(lambda: self._load_decoder(pipeline_dir))

    def _load_decoder(self, pipeline_dir: str) -> None:
        from soar_mega.data.vae import Decoder  # brings diffusers, which most runs do not need

        self._decoder = Decoder.load(Path(pipeline_dir))

    @torch.no_grad()
    def draw(self, engine: Engine) -> Tensor | None:
        """The grid of all prompts [3, H, W] in [0, 1] on rank 0, None elsewhere. Collective over the world."""
        prompts = self._prompts
        with engine.using(self._weights):
            numbers = torch.arange(len(prompts))
            latents = self._noise.draw(engine, prompts.conditions, prompts.empty, numbers)
        if not is_rank_zero():
            return None
        assert self._decoder is not None
        return grid(enlarge(self._decoder.decode(latents)))


def enlarge(images: Tensor) -> Tensor:
    """Images [B, 3, h, w] with each pixel repeated until they are large enough to be looked at."""
    times = max(1, SMALLEST_SHOWN // images.shape[-1])
    return images.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images [B, 3, h, w] side by side with white gaps -> [3, H, W].

    Args:
        columns: None: as many as make it nearly square.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
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
    to_pil(image).save(path)
