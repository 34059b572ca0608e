"""What is measured beside the training loss, each at its own interval, and where it goes."""

import logging
from pathlib import Path

from torch import Tensor

from soar_mega.config import Recipe
from soar_mega.data.info import DatasetInfo
from soar_mega.data.prompts import EncodedPrompts
from soar_mega.data.shards import open_shards
from soar_mega.engines import Engine
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.flow import Schedule
from soar_mega.training.collector import Collector
from soar_mega.training.held_out_rewards import HeldOutRewards
from soar_mega.training.samples import SampleGrid, write_png
from soar_mega.training.tensorboard import Events
from soar_mega.training.validation import HeldOut

logger = logging.getLogger(__name__)


class Measurements:
    """Validation loss, rewards, drift and sample grids of a run; collective over the world.

    By the EMA weights where they are kept: those are what is used.

    Args:
        prompts: of sample grids; None: none are drawn.
        collector: of a run that draws its samples; its held-out prompts are measured by its rewards.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        engine: Engine,
        schedule: Schedule,
        info: DatasetInfo,
        prompts: EncodedPrompts | None,
        events: Events,
        collector: Collector | None = None,
    ) -> None:
        self._settings = recipe.logging
        self._folder = folder
        self._engine = engine
        self._events = events
        weights = "ema" if "ema" in engine.weights else "current"
        self._held_out: HeldOut | None = None
        data = recipe.data
        if data.validation_path and (self._settings.eval_interval or self._settings.drift_interval):
            shards = open_shards(
                data.validation_path, recipe.model.pipeline_dir, data.cache_dir, data.cache_gb
            )
            self._held_out = HeldOut(shards, schedule, recipe.train.micro_batch_size, weights)
        self._rewards: HeldOutRewards | None = None
        if collector is not None and collector.validation is not None:
            held_out, texts = collector.validation
            size = collector.forward_size
            self._rewards = HeldOutRewards(
                held_out, texts, collector.judge, self._settings, info, schedule, size, weights
            )
        self._grid: SampleGrid | None = None
        if prompts is not None:
            self._grid = SampleGrid(
                recipe.model.pipeline_dir, prompts, self._settings, info, schedule, weights
            )

    def take(self, iteration: int) -> None:
        """Takes what is due after `iteration` steps."""
        settings, values = self._settings, dict[str, float]()
        if self._held_out is not None and _due(settings.eval_interval, iteration):
            values |= self._held_out.loss(self._engine, settings.eval_samples)
        if self._rewards is not None and _due(settings.eval_interval, iteration):
            values |= self._rewards.measure(self._engine)
        if self._held_out is not None and _due(settings.drift_interval, iteration):
            values |= self._held_out.drift(self._engine, settings)
        if values:
            told = " | ".join(f"{name}: {value:.6E}" for name, value in values.items())
            logger.info(" held-out at iteration %d | %s |", iteration, told)
            self._events.scalars(values, iteration)
        if self._grid is not None and _due(settings.sample_interval, iteration):
            image = self._grid.draw(self._engine)
            # the others wait here, and not in their next step, which has less time
            on_rank_zero(lambda: self._show(image, iteration))

    def _show(self, image: Tensor | None, iteration: int) -> None:
        assert image is not None
        self._events.image("samples", image, iteration)
        write_png(image, self._folder / "samples" / f"iter_{iteration:07d}.png")


def _due(interval: int, iteration: int) -> bool:
    return interval > 0 and iteration % interval == 0
