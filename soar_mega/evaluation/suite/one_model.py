"""One model through a suite: what is not there yet is drawn and scored, and written as it is made."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.distributed import device
from soar_mega.evaluation.scorer import Scorer
from soar_mega.evaluation.suite.keyed_images import Drawer
from soar_mega.evaluation.suite.prompt_sets import PromptSet, Task
from soar_mega.evaluation.suite.store import DEFECTS, Images, ScoreFile, Store, Values, digest
from soar_mega.evaluation.suite.suite_settings import Point

log = logging.getLogger(__name__)

PICTURES = "pictures"  # beside the scorers: which images are none, but black or NaN
SAID_EVERY = 30.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that evaluate.

    Attributes:
        replica, replicas: which share of the images is its own. All ranks of a model that lies on several have one.
        writes: whether it gets the images.
    """

    replica: int
    replicas: int
    writes: bool
    rank: int
    world_size: int


class Cell:
    """One set of prompts, drawn by one model at one point.

    Args:
        drawn: all that an image depends on, but the point and the prompt.

    Attributes:
        hash: of all that its images depend on, and
        folder: what their folder is called.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        prompt_set: PromptSet,
        point: Point,
        drawn: Mapping[str, Any],
        scorers: Sequence[Scorer],
        rank: int = 0,
    ) -> None:
        self.prompt_set, self.point, self.scorers = prompt_set, point, scorers
        self.hash = digest({**drawn, "guidance_scale": point.guidance_scale, "steps": point.steps})
        self.folder = store.folder_of(self.hash, f"{name}-g{point.guidance_scale:g}-s{point.steps}")
        self.images = Images(store.path / "images" / self.folder / prompt_set.name)
        base = {"images": self.hash, "prompts": prompt_set.hash}
        self._files = {}
        for scorer in (None, *scorers):
            header = base | _identity(scorer)
            self._files[header["scorer"]] = ScoreFile(
                store.path / "scores" / self.folder, prompt_set.name, header, rank
            )

    def look(self) -> None:
        """Finds out what is there."""
        self._names = self.images.names()
        self._scored = {name: set(file.values()) for name, file in self._files.items()}

    def unfinished(self, place: Place) -> list[Task]:
        """What is still to be drawn or scored of this place's share."""
        own = self.prompt_set.tasks[place.replica :: place.replicas]
        return [
            task for task in own
            if not self.is_drawn(task) or any(task.name not in scored for scored in self._scored.values())
        ]  # fmt: skip

    def is_drawn(self, task: Task) -> bool:
        return task.name in self._names

    def keep(self, tasks: Sequence[Task], images: Tensor) -> None:
        """Writes images [N, 3, H, W], and says which are no pictures."""
        for task, image in zip(tasks, images, strict=True):
            self.images.write(task.name, image)
            if defect := self.images.defect(task.name):
                log.warning("the image of %r (%s) is %s", task.item.prompt, self.point, defect)

    def score(self, tasks: Sequence[Task]) -> None:
        """Has images that are there judged by every scorer that has not."""
        if missing := [task for task in tasks if task.name not in self._scored[PICTURES]]:
            found = {task.name: self.images.defect(task.name) for task in missing}
            self._files[PICTURES].add(
                {name: {kind: float(was == kind) for kind in DEFECTS} for name, was in found.items()}
            )
        for scorer in self.scorers:
            if missing := [task for task in tasks if task.name not in self._scored[scorer.name]]:
                # alone on a CPU, where a value is to be the same to the last bit in any company
                size = 1 if device().type == "cpu" else len(missing)
                values: dict[str, Values] = {}
                for group in _groups(missing, size):
                    values |= _judged(scorer, group, self.images)
                self._files[scorer.name].add(values)

    def finish(self) -> None:
        """Puts the scores of all processes together. By one process, when all are there."""
        names = [task.name for task in self.prompt_set.tasks]
        for file in self._files.values():
            file.finish(names)

    def values(self) -> dict[str, dict[str, Values]]:
        """{scorer: {image: {value: number}}}, and the defects."""
        return {name: file.values() for name, file in self._files.items()}


def _identity(scorer: Scorer | None) -> dict[str, str]:
    if scorer is None:
        return {"scorer": PICTURES, "version": "1", "weights": ""}
    return {"scorer": scorer.name, "version": scorer.version, "weights": scorer.weights_hash}


def _judged(scorer: Scorer, tasks: Sequence[Task], images: Images) -> dict[str, Values]:
    """Values by image. ValueError where a scorer does not give each image a finite number of its own name."""
    pictures = torch.stack([images.read(task.name) for task in tasks])
    given = scorer.score(
        pictures, [task.item.prompt for task in tasks], [task.item.metadata for task in tasks]
    )
    own = given.get(scorer.name)
    if own is None or any(value.shape != (len(tasks),) for value in given.values()):
        shapes = {name: list(value.shape) for name, value in given.items()}
        raise ValueError(
            f"scorer {scorer.name} gave {shapes} for {len(tasks)} images: one value for each is expected"
        )
    if not bool(own.isfinite().all()):
        bad = tasks[int((~own.isfinite()).nonzero()[0])]
        raise ValueError(f"scorer {scorer.name} gave no finite value to {images.path(bad.name)}")
    rows = zip(*(value.double().tolist() for value in given.values()), strict=True)
    return {task.name: dict(zip(given, row, strict=True)) for task, row in zip(tasks, rows, strict=True)}


def run_model(
    name: str,
    cells: Sequence[Cell],
    place: Place,
    open_drawer: Callable[[list[str]], Drawer],
    batch_size: int,
) -> None:
    """Draws and scores all cells of one model. Collective over the world.

    Args:
        open_drawer: loads the model, ready for these prompts. Called on all ranks or on none.

    Raises:
        OSError: an image or a score cannot be written. What is written stays, and the next start goes on from there.
        ValueError: what the model or a scorer raises.
    """
    for cell in cells:
        if place.rank == 0:
            cell.images.clean()
        cell.look()
    todo = [(cell, cell.unfinished(place)) for cell in cells]
    prompts = list(
        dict.fromkeys(task.item.prompt for cell, tasks in todo for task in tasks if not cell.is_drawn(task))
    )
    # all ranks have looked when the first one begins to write: those of one replica must agree on what to do
    if _any(bool(prompts)):
        drawer = open_drawer(prompts)
    for cell, tasks in todo:
        done, said = 0, time.monotonic()
        for group in _groups(tasks, batch_size):
            missing = [task for task in group if not cell.is_drawn(task)]
            images = drawer.draw(missing, cell.point) if missing else torch.empty(0)
            if place.writes:
                cell.keep(missing, images)
                cell.score(group)
            done += len(group)
            if time.monotonic() - said > SAID_EVERY or done == len(tasks):
                said = time.monotonic()
                log.info("%s, %s: %s %d of %d images of this process", name, cell.point, cell.prompt_set.name,
                         done, len(tasks))  # fmt: skip
    _any(False)
    if place.rank == 0:
        for cell in cells:
            cell.finish()
    _any(False)


def _groups(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def _any(mine: bool) -> bool:
    """Whether it is so on any rank. Collective: ranks wait for each other here."""
    vote = torch.tensor([int(mine)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote)
