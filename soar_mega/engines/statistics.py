"""What one step of training was like, as numbers that are equal on all ranks."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.distributed import device
from soar_mega.engines.plan import PointPlan
from soar_mega.phases import phases
from soar_mega.stages.points import Points

STRENGTH_QUANTILES = {"k/q05": 0.05, "k/q50": 0.50, "k/q95": 0.95}
KINDS = [
    name for kind in ("loss/base", "loss/aux") for name in (kind, *(f"{kind}_q{q}" for q in (1, 2, 3, 4)))
]


class StepStatistics(Mapping[str, float]):
    """Losses of a step: on their way from the device until one of them is read, which waits for them.

    After the one wait of a step, for its gradient norm, they have arrived.

    "loss" is what is trained on, sum(weight loss)/normaliser. "loss/base", "loss/aux" and their quartiles
    ("loss/base_q1" is sigma in [0, .25)) are plain means over the points that are present, left out where there are
    none. "points" is the number of points that are present.

    Args:
        sums: [2 + 2 K] float64 on the device: the normaliser, the sum of weight x loss, and of each kind the sum of its
            losses, then of each kind the number of its points.
    """

    def __init__(self, sums: Tensor) -> None:
        on_gpu = sums.is_cuda
        self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=on_gpu).copy_(
            sums, non_blocking=True
        )
        self._arrived = torch.cuda.current_stream().record_event() if on_gpu else None
        self._values: dict[str, float] | None = None

    def _read(self) -> dict[str, float]:
        if self._values is None:
            if self._arrived is not None:
                self._arrived.synchronize()
                self._arrived = None
            normaliser, loss, *sums = self._sums.tolist()
            totals, counts = sums[: len(KINDS)], sums[len(KINDS) :]
            means = {k: total / count for k, total, count in zip(KINDS, totals, counts, strict=True) if count}
            points = sum(
                count for k, count in zip(KINDS, counts, strict=True) if k in ("loss/base", "loss/aux")
            )
            self._values = {"loss": loss / normaliser, **means, "points": points}
        return self._values

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def step_statistics(plan: PointPlan, losses: Tensor | None, normaliser: Tensor) -> StepStatistics:
    """The statistics of a step. Collective over the world; nobody waits.

    Args:
        losses: [P] float64 unweighted loss of each point on the last pipeline stage, None elsewhere.
        normaliser: [1] float64, the sum of the counts over the global batch.
    """
    sums = torch.zeros(1 + 2 * len(KINDS), dtype=torch.float64, device=device())
    if losses is not None and parallel_state.get_tensor_and_context_parallel_rank() == 0:
        assert plan.weight is not None and plan.kinds is not None
        by_kind = torch.where(plan.kinds, losses, 0.0).sum(dim=1)
        sums = torch.cat([(plan.weight * losses).sum()[None], by_kind, plan.kinds.sum(dim=1).double()])
    with phases.waiting():
        dist.all_reduce(sums)
    return StepStatistics(torch.cat([normaliser, sums]))


def kinds_of(points: Points) -> Tensor:
    """[K, P] bool: the points of each of KINDS, on the CPU."""
    present = points.count > 0
    quartile = (points.sigma * 4).floor().clamp(max=3)
    masks = []
    for kind in (present & ~points.auxiliary, present & points.auxiliary):
        masks += [kind, *(kind & (quartile == q) for q in range(4))]
    return torch.stack(masks)


def strength_quantiles(points: Points) -> dict[str, float]:
    """Quantiles of the correction strength k over the points of a global batch. Collective; waits for the device."""
    used = points.auxiliary & (points.count > 0)
    mine = torch.where(used, points.strength, torch.nan).to(device())
    group = parallel_state.get_data_parallel_group()
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    strength = torch.cat(everyone).cpu()
    strength = strength[~strength.isnan()]
    if not len(strength):
        return {}
    return {name: strength.quantile(q).item() for name, q in STRENGTH_QUANTILES.items()}
