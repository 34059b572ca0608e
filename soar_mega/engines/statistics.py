"""What one step of training was like, as numbers that are equal on all ranks."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.distributed import device
from soar_mega.phases import phases
from soar_mega.stages.points import Points

StepStatistics = dict[str, float]
STRENGTH_QUANTILES = {"k/q05": 0.05, "k/q50": 0.50, "k/q95": 0.95}


def step_statistics(points: Points, losses: Tensor | None, normaliser: float) -> StepStatistics:
    """Losses by kind of point and by sigma quartile, quantiles of the correction strength. Collective over the world.

    Args:
        points: all points of this rank's batch.
        losses: [P] float64 unweighted loss of each point on the last pipeline stage, None elsewhere.
        normaliser: sum of the counts over the global batch.

    Returns:
        "loss" is what is trained on, sum(weight loss)/normaliser. "loss/base", "loss/aux" and their quartiles
        ("loss/base_q1" is sigma in [0, .25)) are plain means over the points that are present, left out where there
        are none. "points" is the number of points that are present.
    """
    groups = _groups(points)
    sums = torch.zeros(1 + 2 * len(groups), dtype=torch.float64, device=device())
    if losses is not None and parallel_state.get_tensor_and_context_parallel_rank() == 0:
        losses = losses.to("cpu")
        sums[0] = (points.weight * losses).sum()
        for n, mask in enumerate(groups.values()):
            sums[1 + 2 * n] = losses[mask].sum()
            sums[2 + 2 * n] = mask.sum()
    with phases.waiting():
        dist.all_reduce(sums)
    values = sums.tolist()
    found = {"loss": values[0] / normaliser}
    for name, total, count in zip(groups, values[1::2], values[2::2], strict=True):
        if count > 0:
            found[name] = total / count
    found["points"] = values[2] + values[4]
    return found | _strength(points)


def _groups(points: Points) -> dict[str, Tensor]:
    """Masks [P]; base and aux first."""
    present = points.count > 0
    kinds = {"loss/base": present & ~points.auxiliary, "loss/aux": present & points.auxiliary}
    quartile = (points.sigma * 4).floor().clamp(max=3)
    return kinds | {
        f"{kind}_q{q + 1}": mask & (quartile == q) for kind, mask in kinds.items() for q in range(4)
    }


def _strength(points: Points) -> StepStatistics:
    used = points.auxiliary & (points.count > 0)
    mine = torch.where(used, points.strength, torch.nan).to(device())
    group = parallel_state.get_data_parallel_group()
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    strength = torch.cat(everyone)
    strength = strength[~strength.isnan()].cpu()
    if not len(strength):
        return {}
    return {name: strength.quantile(q).item() for name, q in STRENGTH_QUANTILES.items()}
