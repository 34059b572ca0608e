"""The log line of a run, in Megatron's format, averaged over the steps since the last one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

THROUGHPUT = {
    "tflops-per-gpu": "throughput per GPU (TFLOP/s/GPU)",
    "tflops-per-process": "throughput per process (TFLOP/s)",
    "mfu": "MFU",
}


@dataclass
class Interval:
    """Sums over the steps since the last log line."""

    steps: int = 0
    seconds: float = 0.0  # of the steps alone: measurements and checkpoints are not counted
    samples: int = 0
    skipped: int = 0
    nan: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, statistics: Mapping[str, float], samples: int, ok: bool, seconds: float) -> None:
        """Counts one step; the statistics of skipped steps are left out of the averages, as in Megatron.

        Args:
            statistics: the engine's; a name may be missing in some steps (an empty sigma quartile).
            samples: global batch size of the step.
        """
        self.steps += 1
        self.samples += samples
        self.seconds += seconds
        if not ok:
            self.skipped += 1
            self.nan += not math.isfinite(statistics["loss"])
            return
        for name, value in statistics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def averages(self) -> dict[str, float]:
        """Mean of each statistic over the steps that had it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def log_line(
    interval: Interval,
    *,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    learning_rate: float,
    global_batch_size: int,
    grad_norm: float,
    throughput: Mapping[str, float],
) -> str:
    """Megatron-LM's training log line (training_log in megatron/training/training.py), with seven digits.

    Tools that parse Megatron logs split it at " |" and ": ".

    Args:
        throughput: of `soar_mega.training.throughput`.
    """
    averages = interval.averages()
    parts = [
        f" iteration {iteration:8d}/{train_iters:8d} |",
        f" consumed samples: {consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {1000.0 * interval.seconds / max(interval.steps, 1):.1f} |",
        *(f" {THROUGHPUT[name]}: {value:.4g} |" for name, value in throughput.items()),
        f" learning rate: {learning_rate:.6E} |",
        f" global batch size: {global_batch_size:5d} |",
    ]
    if "loss" in averages:
        parts.append(f" loss: {averages['loss']:.6E} |")
        parts.append(f" grad norm: {grad_norm:.6E} |")
    parts.append(f" number of skipped iterations: {interval.skipped:3d} |")
    parts.append(f" number of nan iterations: {interval.nan:3d} |")
    return "".join(parts)
