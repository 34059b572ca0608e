"""The losses of a step sample by sample: which sample is the bad one?"""

import math
from dataclasses import dataclass

from megatron.core import parallel_state
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.distributed import gather_on_rank_zero
from soar_mega.stages.points import Points


@dataclass(frozen=True, kw_only=True)
class PointLoss:
    """One training point."""

    kind: str
    sigma: float
    loss: float  # unweighted


@dataclass(frozen=True, kw_only=True)
class SampleLoss:
    """One sample of a global batch."""

    position: int  # in the training sequence
    index: int  # in the data set
    name: str  # of its source, and where it lies
    points: list[PointLoss]  # the present ones
    compared: str  # the kind of point that samples are compared by

    @property
    def worst(self) -> float:
        """The largest loss of its points of that kind; infinite where that of any point is not finite."""
        if not all(math.isfinite(p.loss) for p in self.points):
            return math.inf
        return max((p.loss for p in self.points if p.kind == self.compared), default=0.0)


def sample_losses(
    points: Points, losses: Tensor | None, batch: Batch, indices: list[int], worst: int | None = None
) -> list[SampleLoss]:
    """The samples of the global batch on rank 0, worst first; nothing on the other ranks. Collective over the world.

    Args:
        points: all points of this rank's batch.
        losses: [P] float64 of each point on the last pipeline stage, None elsewhere.
        indices: of the samples of this rank's rows in the data set; read on the last stage's first rank.
        worst: how many; None: all.
    """
    mine: list[SampleLoss] = []
    if losses is not None and parallel_state.get_tensor_and_context_parallel_rank() == 0:
        mine = _sorted(_of_this_rank(points, losses, batch, indices))[:worst]
    return _sorted([sample for part in gather_on_rank_zero(mine) for sample in part])[:worst]


def _of_this_rank(points: Points, losses: Tensor, batch: Batch, indices: list[int]) -> list[SampleLoss]:
    """A sample may have several rows of the batch: the states of its steps."""
    positions = batch.position.tolist()
    first = {position: row for row, position in reversed(list(enumerate(positions)))}
    found: dict[int, list[PointLoss]] = {position: [] for position in positions}
    columns = (points.sample, points.kind, points.sigma, losses.cpu(), points.count > 0)
    for sample, kind, sigma, loss, present in zip(*(c.tolist() for c in columns), strict=True):
        if present:
            found[positions[sample]].append(PointLoss(kind=points.kinds[kind], sigma=sigma, loss=loss))
    return [
        SampleLoss(
            position=position,
            index=indices[first[position]],
            name=batch.names[first[position]],
            points=of_sample,
            compared=points.kinds[0],
        )
        for position, of_sample in found.items()
    ]


def _sorted(samples: list[SampleLoss]) -> list[SampleLoss]:
    """Those without a point come last: losses may be negative."""
    return sorted(samples, key=lambda sample: (not sample.points, -sample.worst, sample.position))
