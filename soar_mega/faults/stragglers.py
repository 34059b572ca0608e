"""How long each rank works on a step of its own, and which one the others wait for."""

import logging
import socket
import statistics

import torch
import torch.distributed as dist

from soar_mega.distributed import device
from soar_mega.phases import phases

logger = logging.getLogger(__name__)

PHASES = ("data", "answer", "learn", "optimizer")
PATIENCE = 3  # log intervals in a row in which a rank is slow


class Stragglers:
    """Compares the ranks once per log interval.

    A rank's own time leaves out what it waited for all ranks in: agreements, the reduction of gradients, statistics.
    The ranks of one replica (TP, PP, CP) wait for each other in between and so have nearly the same time: one slow rank
    makes its replica slow.

    Args:
        factor: a rank is slow when its time is above this times the median; 0: nobody is.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._slowest, self._in_a_row = -1, 0

    def compare(self, steps: int) -> dict[str, float]:
        """Seconds per step of the ranks since the last call: timers/step-min, -median, -max. Collective."""
        taken = phases.take_seconds()
        mine = torch.tensor([taken.get(phase, 0.0) for phase in PHASES], dtype=torch.float64, device=device())
        everyone = torch.empty(dist.get_world_size(), len(PHASES), dtype=torch.float64, device=device())
        dist.all_gather(list(everyone.unbind()), mine / steps)
        seconds = everyone.cpu()
        totals = seconds.sum(dim=1).tolist()
        median = statistics.median(totals)
        slowest = max(range(len(totals)), key=totals.__getitem__)
        if self._factor and totals[slowest] > self._factor * median:
            self._in_a_row = self._in_a_row + 1 if slowest == self._slowest else 1
            self._slowest = slowest
        else:
            self._in_a_row = 0
        if self._in_a_row == PATIENCE:
            self._in_a_row = 0
            self._warn(seconds[slowest].tolist(), median)
        found = {"min": min(totals), "median": median, "max": totals[slowest]}
        return {f"timers/step-{name}": value for name, value in found.items()}

    def _warn(self, seconds: list[float], median: float) -> None:
        host = [socket.gethostname()]
        dist.broadcast_object_list(host, src=self._slowest)
        parts = ", ".join(f"{phase} {1000 * value:.0f}" for phase, value in zip(PHASES, seconds, strict=True))
        if dist.get_rank() == 0:
            logger.warning(
                "rank %d on %s is slow: %.0f ms of its own work per step (%s), the median rank %.0f ms, for %d log "
                "intervals in a row",
                *(self._slowest, host[0], 1000 * sum(seconds), parts, 1000 * median, PATIENCE),
            )
