"""The model against what was measured on one H100."""

import json
import re
from dataclasses import replace
from pathlib import Path

from plan.hardware import H100, Hardware
from plan.step_time import StepModel
from soar_mega.config import ModelConfig, Recipe, TrainConfig
from soar_mega.models.common.flops import Tokens
from soar_mega.models.common.memory import largest_rank, workload
from soar_mega.models.common.rank_parameters import trained_elements
from soar_mega.models.family import presets
from soar_mega.stages import SoarConfig

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
FILE = RESULTS / "2026-11-26-h100-first-run.json"
WITH_GRAPHS = RESULTS / "2026-11-27-h100-80gb-hbm3-compare-sd35_medium.json"
# the row's name there -> points of a forward, recomputation
ROWS = {
    "ours, 4 points per forward, no recomputation": (4, "none"),
    "ours, 8 points": (8, "none"),
    "ours, 28 points, full recomputation": (28, "full"),
    "ours, 16 points, no recomputation": (16, "none"),
}
# That commit added a bf16 gradient of each weight to its float32 sum in a pass of its own, per micro-batch; bytes
ADDED = 2 + 2 + 4 + 4


def check(hardware: Hardware = H100) -> str:
    """Samples per second and peak memory of each row, measured and predicted, as text."""
    table = json.loads(FILE.read_text())["tables"][0]
    measured = {row[0]: (_middle(row[1]), float(row[5])) for row in table["rows"]}
    sizes, tokens = presets()["sd35_medium"], Tokens(1024, 154)
    lines = [
        f"one H100, {table['title']}",
        "4 and 8 points, and the time of kernels at 8, are what the model's constants were taken from",
        f"{'samples/s':>10} {'predicted':>10} {'error':>7} {'GiB':>6} {'predicted':>10} {'error':>7}  row",
    ]
    errors = []
    for name, (points, granularity) in ROWS.items():
        recipe = Recipe(
            model=ModelConfig(preset="sd35_medium", recompute_granularity=granularity),
            stage=SoarConfig(),
            train=TrainConfig(
                global_batch_size=16, micro_batch_size=4, points_per_micro_batch=points, cuda_graphs="none"
            ),
        )
        work = workload(recipe, 1, (64, 64), tokens.text)
        time = StepModel(sizes, recipe, hardware, 1, 8, tokens).step(work)
        adds = work.micro_batches * ADDED * trained_elements(sizes, recipe, 0) / hardware.copy
        # where the host is the slower one, the device has room for them
        is_host_bound = points < 16
        total = time.total + (0.0 if is_host_bound else adds)
        memory = largest_rank(sizes, recipe, work, 1).total / 2**30
        speed, peak = measured[name]
        found = 16 / total
        errors += [found / speed - 1]
        lines.append(
            f"{speed:10.2f} {found:10.2f} {found / speed - 1:+7.1%} {peak:6.0f} {memory:10.1f} "
            f"{memory / peak - 1:+7.1%}  {name}"
        )
    graphs = replace(recipe, train=replace(recipe.train, cuda_graphs="layers"))
    found = 16 / StepModel(sizes, graphs, hardware, 1, 8, tokens).step(work).total
    speed = with_graphs(recipe.train.points_per_micro_batch)
    errors.append(found / speed - 1)
    lines.append(
        f"{speed:10.2f} {found:10.2f} {errors[-1]:+7.1%} {'':>25}  the last with CUDA graphs, gradients added in the "
        "products"
    )
    worst = max(map(abs, errors))
    return "\n".join([*lines, f"largest error of the speed: {worst:.0%}"])


def with_graphs(points: int | None) -> float:
    """Samples per second that tools/compare_baseline.py measured, by torch's attention."""
    rows = json.loads(WITH_GRAPHS.read_text())["rows"]
    [row] = [row for row in rows if row["name"] == f"soar_mega, {points} points, CUDA graphs"]
    return row["samples_per_second"]


def _middle(words: str) -> float:
    """Of `4.5 to 4.9`."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", words)]
    return sum(numbers) / len(numbers)
