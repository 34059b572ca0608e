"""Models through a suite, one after the other, and the report over all of them."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from soar_mega.checkpoints.drawing import CHECKPOINT, Source
from soar_mega.config import ParallelConfig
from soar_mega.distributed import data_rank, data_size, is_first_of_replica
from soar_mega.evaluation.scorer import Scorer
from soar_mega.evaluation.suite.drawing import Drawer, Drawn
from soar_mega.evaluation.suite.prompts import PromptSet
from soar_mega.evaluation.suite.settings import Suite
from soar_mega.evaluation.suite.store import Store
from soar_mega.evaluation.suite.work import Cell, Place, run_model
from soar_mega.faults.agreement import on_rank_zero

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Something that is evaluated.

    Attributes:
        size: (width, height) in pixels, in the place of the suite's.
    """

    name: str
    source: Source
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A suite in its folder. All methods are collective over the world.

    Attributes:
        scorers: by name, all that the sets ask for.
        parallel: the layout of checkpoints.
        batch_size: images drawn together.
    """

    store: Store
    suite: Suite
    sets: Sequence[PromptSet]
    scorers: dict[str, Scorer]
    parallel: ParallelConfig
    dtype: str
    batch_size: int

    def run(self, model: Model) -> list[Cell]:
        """Draws and scores all images of one model that are not there yet.

        Raises:
            ValueError: the model cannot be read or drawn with, or a scorer gives no value.
            OSError: something cannot be read or written; what is there stays.
        """
        drawn = Drawn(
            size=model.size or self.suite.size,
            solver=self.suite.solver,
            seed=self.suite.seed,
            dtype=self.dtype,
            batch_size=self.batch_size,
        )
        cells = self._cells(model, drawn)
        place = _place(model.source)

        def drawer(prompts: list[str]) -> Drawer:
            return model.source.drawer(prompts, drawn, self.parallel, place.writes)

        run_model(model.name, cells, place, drawer, self.batch_size)
        return cells

    def _cells(self, model: Model, drawn: Drawn) -> list[Cell]:
        fingerprint = on_rank_zero(model.source.fingerprint)
        said: dict[str, Any] = {"model": fingerprint} | dataclasses.asdict(drawn)
        del said["batch_size"]
        name = re.sub(r"[^\w.-]", "_", model.name)
        make = functools.partial(Cell, self.store, name, drawn=said, rank=dist.get_rank())
        return [
            make(prompt_set=each, point=point, scorers=[self.scorers[name] for name in each.settings.scorers])
            for each in self.sets
            for point in self.suite.points
        ]


def _place(source: Source) -> Place:
    """A checkpoint lies on the ranks of a replica, which draw together; everything else is whole on each rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if source.kind == CHECKPOINT:
        return Place(
            replica=data_rank(),
            replicas=data_size(),
            writes=is_first_of_replica(),
            rank=rank,
            world_size=world,
        )
    return Place(replica=rank, replicas=world, writes=True, rank=rank, world_size=world)
