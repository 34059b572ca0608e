"""Steps to look at: a loss far above those before, a loss or a gradient that is not finite.

Each becomes a line of anomalies.jsonl in the run folder and a warning in the log. They name the samples with the
largest losses; `soar-mega train RECIPE --replay-step N` computes such a step again.
"""

import json
import logging
import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from soar_mega.distributed import is_rank_zero
from soar_mega.engines import StepResult
from soar_mega.engines.sample_losses import SampleLoss, sample_losses
from soar_mega.engines.statistics import StepStatistics
from soar_mega.training.loop import Steps

logger = logging.getLogger(__name__)

FILE = "anomalies.jsonl"
WINDOW, LEAST = 100, 20  # losses that are compared with, at most and at least
SMALLEST_SPREAD = (
    0.01  # of the median: losses that hardly differ are no reason to warn of the first that does
)
NAMED = 8  # samples


class LossWindow:
    """The losses of the last steps. Starts empty with each start of a run.

    These are the losses of the stage's first kind of point. For SOAR that is base points: auxiliary ones at small sigma
    are large by nature, 1/sigma^2 times the error of the rollout. Middle and spread are the median and the median
    absolute deviation.

    Args:
        factor: how many deviations above the median is a spike; 0: nothing is.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def limit(self) -> float:
        """Losses above this are spikes; infinite while too few are known."""
        if not self._factor or len(self._losses) < LEAST:
            return math.inf
        middle = statistics.median(self._losses)
        spread = statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self._factor * max(spread, SMALLEST_SPREAD * abs(middle))

    def add(self, loss: float) -> None:
        """Takes in the loss of a step."""
        if math.isfinite(loss):
            self._losses.append(loss)


class Anomalies:
    """Watches the steps of a run.

    Args:
        kind: of the points whose loss is compared.
    """

    def __init__(self, folder: Path, loss_spike_factor: float, kind: str) -> None:
        self._kind = kind
        self._path = folder / FILE
        self._window = LossWindow(loss_spike_factor)

    def look(self, steps: Steps, found: StepStatistics, result: StepResult) -> None:
        """Looks at the step that was computed last. Collective over the world: all ranks see the same losses."""
        limit, loss = self._window.limit(), found["loss"]
        compared = found.get(f"loss/{self._kind}", loss)
        self._window.add(compared)
        if result.ok and compared <= limit:
            return
        worst = worst_samples(steps, NAMED)
        if not is_rank_zero():
            return
        count = steps.recipe.train.global_batch_size
        last = steps.progress.consumed_samples
        event = {
            "kind": "loss_spike" if result.ok else "not_finite",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "iteration": steps.progress.iteration,
            "loss": number(loss),
            f"{self._kind}_loss": number(compared),
            "limit": number(limit),
            "grad_norm": number(result.grad_norm),
            "positions": [last - count, last - 1],
            "worst_samples": [told(sample) for sample in worst],
        }
        with open(self._path, "a") as file:
            file.write(json.dumps(event) + "\n")
        what = f"skipped: loss {loss}, gradient norm {result.grad_norm}"
        if result.ok:
            what = f"{self._kind} loss {compared:.6E} is above {limit:.6E}"
        first = worst[0]
        logger.warning(
            "iteration %d: %s. The largest loss is %.6E, of %s (sample %d of the data, position %d in training); %s "
            "has more, and --replay-step computes the step again",
            *(event["iteration"], what, first.worst, first.name, first.index, first.position, self._path),
        )


def worst_samples(steps: Steps, count: int | None) -> list[SampleLoss]:
    """The samples of the last step with the largest losses, on rank 0; None: all. Collective over the world."""
    points, losses = steps.engine.learned
    indices = steps.loader.indices() if steps.loader.ranks.reads else []
    return sample_losses(points, losses, steps.batch, indices, count)


def told(sample: SampleLoss) -> dict[str, Any]:
    """As JSON."""
    return {
        "position": sample.position,
        "index": sample.index,
        "name": sample.name,
        "points": [{"kind": p.kind, "sigma": p.sigma, "loss": number(p.loss)} for p in sample.points],
    }


def number(value: float) -> float | str:
    """JSON has no infinity and nothing that is not a number: these as text."""
    return value if math.isfinite(value) else str(value)
