"""What is told of each collection: its rewards in numbers and curves, and its best, median and worst samples."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.config import LoggingConfig
from soar_mega.evaluation.scorer import TOTAL
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.training.collector import Collection, Collector
from soar_mega.training.samples import enlarge, grid, write_png
from soar_mega.training.tensorboard import Events

logger = logging.getLogger(__name__)

SHOWN = 4  # samples of each kind
FOLDER = "collections"  # of the run folder


class CollectionReport:
    """Reports on a run's collections; collective over the world."""

    def __init__(self, collector: Collector, folder: Path, settings: LoggingConfig, events: Events) -> None:
        self.collector = collector
        self._folder, self._interval, self._events = folder / FOLDER, settings.collection_interval, events

    def report(self, found: Collection, iteration: int) -> None:
        """Tells of the collection that step `iteration` begins to learn from.

        Raises:
            ValueError: a reward could not judge a single sample; PeerFailure on the other ranks than the first.
        """
        on_rank_zero(lambda: self._tell(found, iteration))
        if self._interval and found.number % self._interval == 0:
            chosen = best_median_worst(found.advantages)
            latents = self.collector.latents(chosen)
            dist.all_reduce(latents)  # each is held by the ranks of one replica, and told of by one of them
            on_rank_zero(lambda: self._show(latents, iteration))

    def _tell(self, found: Collection, iteration: int) -> None:
        judge = self.collector.judge
        assert judge is not None
        judge.rewards.examine(found.rewards)
        values = statistics(found)
        told = " | ".join(f"{name}: {value:.6G}" for name, value in values.items())
        logger.info(" collection %d for iteration %d | %s |", found.number, iteration, told)
        self._events.scalars(values, iteration)
        for name, rewards in found.rewards.items():
            self._events.histogram(f"reward/{name}", rewards, iteration)
        self._events.histogram("advantage", found.advantages, iteration)

    def _show(self, latents: Tensor, iteration: int) -> None:
        judge = self.collector.judge
        assert judge is not None
        sheet = grid(enlarge(judge.decoder.decode(latents)), columns=len(latents) // 3)
        self._events.image("collection", sheet, iteration)
        write_png(sheet, self._folder / f"iter_{iteration:07d}.png")


def statistics(found: Collection) -> dict[str, float]:
    """Of a collection: mean and deviation of each reward, and what its groups have to learn from."""
    values: dict[str, float] = {}
    for name in (TOTAL, *(name for name in found.rewards if name != TOTAL)):
        judged = found.rewards[name][found.rewards[name].isfinite()]
        if len(judged):  # one that is only looked at may have none
            values |= {f"reward/{name}": judged.mean().item(), f"reward/{name}/std": _deviation(judged)}
    total = found.rewards[TOTAL]
    is_judged = total.isfinite()
    groups = [total[is_judged & (found.prompt == prompt)] for prompt in found.prompt[is_judged].unique()]
    deviations = [_deviation(group) for group in groups]
    return values | {
        "reward/std-within-groups": sum(deviations) / len(deviations),
        "reward/groups-without-variance": sum(each == 0 for each in deviations) / len(deviations),
        "reward/samples-not-judged": int(total.isnan().sum()),
        "collection/seconds": found.seconds,
        "collection/samples-per-second": len(total) / found.seconds,
    }


def best_median_worst(advantages: Tensor) -> Tensor:
    """Places [3 n] in a collection: n of the best samples, n in the middle, n of the worst; n is 4, or less."""
    order = advantages.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    judged = order[: int(advantages.isfinite().sum())]
    count = max(1, min(SHOWN, len(judged) // 3))
    middle = (len(judged) - count) // 2
    return torch.cat([judged[:count], judged[middle : middle + count], judged[-count:]])


def _deviation(values: Tensor) -> float:
    """Population standard deviation; 0 of fewer than two values, or of equal ones."""
    return 0.0 if len(values) < 2 or bool(values.min() == values.max()) else values.std(correction=0).item()
