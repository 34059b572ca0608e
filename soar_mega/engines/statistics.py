"""What one step of training was like, as numbers that are equal on all ranks."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.distributed import device
from soar_mega.engines.plan import PointPlan
from soar_mega.phases import phases
from soar_mega.stages.points import Points

QUANTILES = {"q05": 0.05, "q50": 0.50, "q95": 0.95}


def loss_names(kinds: Sequence[str]) -> list[str]:
    """Of each kind the loss, and that of each quartile of sigma."""
    return [f"loss/{kind}{part}" for kind in kinds for part in ("", "_q1", "_q2", "_q3", "_q4")]


class StepStatistics(Mapping[str, float]):
    """Losses of a step: on their way from the device until one of them is read, which waits for them.

    After the one wait of a step, for its gradient norm, they have arrived.

    "loss" is what is trained on, sum(weight loss)/normaliser. The loss of each kind of point ("loss/base") and those of
    its quartiles ("loss/base_q1" is sigma in [0, .25)) are plain means over the points that are present, left out where
    there are none. "points" is the number of points that are present. What a loss observed has names of its own: each a
    mean over the points by their counts, left out where none is present.

    Args:
        kinds: names of the kinds of points.
        sums: [2 + 2 K + O] float64 on the device: the normaliser, the sum of weight x loss, for each of the K names of
            `loss_names` the sum of the losses, then for each the number of points, and of each thing observed the sum
            of count x value.
        observes: their names.
    """

    def __init__(self, kinds: Sequence[str], sums: Tensor, observes: Sequence[str] = ()) -> None:
        self._kinds, self._observes = kinds, observes
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
            names = loss_names(self._kinds)
            counts = dict(zip(names, sums[len(names) : 2 * len(names)], strict=True))
            means = {
                name: total / counts[name]
                for name, total in zip(names, sums[: len(names)], strict=True)
                if counts[name]
            }
            points = sum(counts[f"loss/{kind}"] for kind in self._kinds)
            seen = zip(self._observes, sums[2 * len(names) :], strict=True)
            observed = {name: total / normaliser for name, total in seen} if points else {}
            self._values = {"loss": loss / normaliser, **means, "points": points, **observed}
        return self._values

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def step_statistics(
    plan: PointPlan, found: Tensor | None, normaliser: Tensor, observes: Sequence[str] = ()
) -> StepStatistics:
    """The statistics of a step. Collective over the world; nobody waits.

    Args:
        found: [1 + O, P] float64 on the last pipeline stage, None elsewhere: the unweighted loss of each point, and
            what was observed there.
        normaliser: [1] float64, the sum of the counts over the global batch.
        observes: the names of what was observed.
    """
    kinds = plan.points.kinds
    length = 1 + 2 * len(loss_names(kinds)) + len(observes)
    sums = torch.zeros(length, dtype=torch.float64, device=device())
    if found is not None and parallel_state.get_tensor_and_context_parallel_rank() == 0:
        assert plan.weight is not None and plan.count is not None and plan.masks is not None
        losses, observed = found[0], found[1:]
        by_kind = torch.where(plan.masks, losses, 0.0).sum(dim=1)
        seen = torch.where(plan.count > 0, plan.count * observed, 0.0).sum(dim=1)
        loss = (plan.weight * losses).sum()[None]
        sums = torch.cat([loss, by_kind, plan.masks.sum(dim=1).double(), seen])
    with phases.waiting():
        dist.all_reduce(sums)
    return StepStatistics(kinds, torch.cat([normaliser, sums]), observes)


def masks_of(points: Points) -> Tensor:
    """[K, P] bool: the points behind each of `loss_names`, on the CPU."""
    present = points.count > 0
    quartile = (points.sigma * 4).floor().clamp(max=3)
    masks = []
    for kind in range(len(points.kinds)):
        mask = present & (points.kind == kind)
        masks += [mask, *(mask & (quartile == q) for q in range(4))]
    return torch.stack(masks)


def quantiles(points: Points) -> dict[str, float]:
    """Of what is measured at the points of a global batch. Collective; waits for the device."""
    found: dict[str, float] = {}
    group = parallel_state.get_data_parallel_group()
    for name, values in points.measured.items():
        mine = torch.where(points.count > 0, values, torch.nan).to(device())
        everyone = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(everyone, mine, group=group)
        measured = torch.cat(everyone).cpu()
        measured = measured[~measured.isnan()]
        if len(measured):
            found |= {f"{name}/{key}": measured.quantile(q).item() for key, q in QUANTILES.items()}
    return found
