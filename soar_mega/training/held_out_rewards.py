"""Rewards of images for held-out prompts while training: what a method that learns from rewards is worth."""

import torch
from torch import Tensor

from soar_mega import distributed
from soar_mega.config import LoggingConfig
from soar_mega.data.info import DatasetInfo
from soar_mega.data.prompt_files import PromptSet
from soar_mega.engines import Engine
from soar_mega.flow import Schedule
from soar_mega.training.judge_queue import Judge, rewards_of_all
from soar_mega.training.prompt_texts import PromptTexts
from soar_mega.training.samples import FixedNoise


class HeldOutRewards:
    """One image for each prompt of a set, from noise that is the same in all runs.

    Args:
        judge: on the one rank of each replica that judges, None on the others.
        size: samples of a forward.
        weights: which of the engine's weights are measured.
    """

    def __init__(
        self,
        prompts: PromptSet,
        texts: PromptTexts,
        judge: Judge | None,
        settings: LoggingConfig,
        info: DatasetInfo,
        schedule: Schedule,
        size: int,
        weights: str,
    ) -> None:
        self._prompts, self._texts, self._judge = prompts, texts, judge
        self._size, self._weights = size, weights
        self._noise = FixedNoise(settings, info, schedule)

    @torch.no_grad()
    def measure(self, engine: Engine) -> dict[str, float]:
        """Mean of each reward over the images that it could judge: validation/reward/NAME. Collective over the world.

        Raises:
            DataError: the rewards cannot be had; on all ranks alike.
        """
        with engine.using(self._weights):
            for places, mine in self._shares():
                latents = self._draw(engine, places)
                if self._judge is not None and mine:
                    asked = places[:mine].tolist()
                    prompts = [self._prompts.prompts[i] for i in asked]
                    metadata = [self._prompts.metadata[i] for i in asked]
                    self._judge.submit(places[:mine], latents[:mine].cpu(), prompts, metadata)
        rewards = rewards_of_all(self._judge, len(self._prompts))
        return {f"validation/reward/{name}": values.nanmean().item() for name, values in rewards.items()}

    def _shares(self) -> list[tuple[Tensor, int]]:
        """This replica's prompts [size] of each forward, and how many of them count: all make equally many."""
        replicas, replica = distributed.data_size(), distributed.data_rank()
        count = len(self._prompts)
        size = min(self._size, -(-count // replicas))
        begins = range(replica * size, -(-count // (size * replicas)) * size * replicas, size * replicas)
        return [
            (torch.arange(first, first + size).clamp(max=count - 1), min(max(count - first, 0), size))
            for first in begins
        ]

    def _draw(self, engine: Engine, places: Tensor) -> Tensor:
        prompts, empty = self._texts.of(torch.arange(len(self._prompts)))
        return self._noise.draw(engine, prompts.rows(places), empty, places, self._size)
