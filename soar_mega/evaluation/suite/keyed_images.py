"""Images of prompts whose noise is a function of the prompt and its number: the same in any company, on any rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from soar_mega.data.encoder_facts import loading
from soar_mega.data.prompts import EncodedPrompts, encode_prompts
from soar_mega.distributed import device
from soar_mega.evaluation.generate import Generator
from soar_mega.evaluation.suite.prompt_sets import Task
from soar_mega.evaluation.suite.suite_settings import Point
from soar_mega.flow import normal
from soar_mega.flow.noise import stream_key
from soar_mega.models.common.build import DTYPES

STREAM = "evaluate"
CPU_ROWS = 8  # of a forward: the last bits of a product depend on how many rows it has


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What images depend on beside the weights, the same for a whole evaluation of a model.

    Attributes:
        size: (width, height) in pixels; None: the transformer's own.
        batch_size: images of a forward on a GPU. On a CPU it is CPU_ROWS, and a batch that is not full is filled up:
            there the images are the same to the last bit whatever is drawn together.
    """

    size: tuple[int, int] | None
    solver: str
    seed: int
    dtype: str
    batch_size: int

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Tasks as they are drawn together, all batches of one size."""
        rows = CPU_ROWS if device().type == "cpu" else self.batch_size
        batches = [list(tasks[start : start + rows]) for start in range(0, len(tasks), rows)]
        return [batch + [batch[-1]] * (rows - len(batch)) for batch in batches]


class Drawer(Protocol):
    """Draws with one model. Where that lies on several ranks all of them call it alike, and one gets the images."""

    def draw(self, tasks: Sequence[Task], point: Point) -> Tensor:
        """Images [N, 3, H, W] on the CPU; [0] on a rank that draws for another."""
        ...


class KeyedDrawer:
    """Draws with a transformer in our implementation.

    Args:
        prompts: all that will be drawn, in the order of `encoded`.
    """

    def __init__(
        self, generator: Generator, prompts: Sequence[str], encoded: EncodedPrompts, drawn: Drawn
    ) -> None:
        self._generator, self._encoded, self._drawn = generator, encoded, drawn
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        side = generator.facts.default_resolution
        self._shape = generator.latent_shape(*(drawn.size or (side, side)))

    def draw(self, tasks: Sequence[Task], point: Point) -> Tensor:
        images = [self._batch(batch, point) for batch in self._drawn.batches(tasks)]
        return torch.cat(images)[: len(tasks)]

    def _batch(self, tasks: Sequence[Task], point: Point) -> Tensor:
        asked = self._encoded.conditions.rows(torch.tensor([self._rows[task.item.prompt] for task in tasks]))
        position = torch.tensor([task.item.position for task in tasks])
        number = torch.tensor([task.noise for task in tasks])
        noise = normal(self._drawn.seed, STREAM, position, number, self._shape)
        scale, solver = point.guidance_scale, self._drawn.solver
        return self._generator.draw(asked, self._encoded.empty, noise, point.steps, scale, solver)


def encode_alone(
    pipeline_dir: str | Path, prompts: Sequence[str], dtype: str, max_sequence_length: int | None
) -> EncodedPrompts:
    """Prompts encoded one at a time: an embedding does not depend on the other prompts, to the last bit."""
    return encode_prompts(pipeline_dir, prompts, DTYPES[dtype], max_sequence_length, batch_size=1)


class DiffusersDrawer:
    """Draws with diffusers' own classes, for pipelines of architectures that are not ours (SD-XL).

    Args:
        folder: read with nothing but what is in it.

    Raises:
        ValueError: it cannot be loaded, or draws no images of prompts.
    """

    def __init__(self, folder: str | Path, drawn: Drawn) -> None:
        from diffusers import DiffusionPipeline  # slow to import
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._drawn = drawn
        with loading(Path(folder)):
            self._pipeline: Any = DiffusionPipeline.from_pretrained(
                folder, torch_dtype=DTYPES[drawn.dtype], local_files_only=True
            ).to(device())
        self._pipeline.set_progress_bar_config(disable=True)
        self._size = dict(zip(("width", "height"), drawn.size, strict=True)) if drawn.size else {}

    @torch.no_grad()
    def draw(self, tasks: Sequence[Task], point: Point) -> Tensor:
        images = [self._batch(batch, point) for batch in self._drawn.batches(tasks)]
        return torch.cat(images)[: len(tasks)]

    def _batch(self, tasks: Sequence[Task], point: Point) -> Tensor:
        # a generator for each image, on the CPU: torch's own numbers, and again a function of prompt and number alone
        seeds = [_seed(self._drawn.seed, task) for task in tasks]
        drawn = self._pipeline(
            prompt=[task.item.prompt for task in tasks],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=point.steps,
            guidance_scale=point.guidance_scale,
            output_type="pt",
            **self._size,
        )
        return drawn.images.detach().float().cpu()  # type: ignore[no-any-return]


def _seed(seed: int, task: Task) -> int:
    low, high = stream_key(seed, f"{STREAM}/{task.item.key}/{task.noise}")
    return (high << 32 | low) >> 1
