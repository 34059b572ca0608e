"""Writes docs/scaling.md: strong and weak scaling of SOAR to 16,384 GPUs, as plan_layout's model predicts it.

    python tools/scaling_page.py

Measured are one GPU and four processes on a CPU; all else on the page is a prediction, and the page says so.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from gpu_page import link, table
from plan.check import check
from plan.hardware import HARDWARE
from plan.search import Case, Plan, plan_of, search
from plan.validate import predicted, process_of, spearman
from plan_layout import name

from soar_mega.cli.process import start_process
from soar_mega.config import ModelConfig, Recipe, TrainConfig
from soar_mega.models.common.micro_batches import recomputations
from soar_mega.models.family import presets
from soar_mega.stages import SoarConfig

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
GPUS = [8 << n for n in range(12)]  # 8 to 16,384
MODELS = {"sd35_medium": "SD3.5-Medium", "sd35_large": "SD3.5-Large", "flux_dev": "FLUX.1 dev"}
STRONG_BATCH, WEAK_SAMPLES = 2048, 4
TENSOR = (1, 2, 4, 8)
ALONE, POINTS = "sd35_medium", (8, 16, 28)  # of a forward, where one GPU is all


def case_of(model: str, gpus: int, batch: int) -> Case:
    """512 px, six auxiliary points, H100s in nodes of eight."""
    recipe = Recipe(
        model=ModelConfig(preset=model), stage=SoarConfig(), train=TrainConfig(global_batch_size=batch)
    )
    sizes = presets()[model]
    return Case(sizes, recipe, gpus, HARDWARE["h100"], (64, 64), sizes.family.text_tokens)


def best_by_tensor(case: Case) -> dict[int, Plan]:
    """The fastest plan of each tensor-parallel size, over megatron's engine."""
    best: dict[int, Plan] = {}
    for plan in search(case)[0]:
        parallel = plan.recipe.parallel
        if parallel.engine == "megatron":
            best.setdefault(parallel.tensor_model_parallel_size, plan)
    return best


def fastest(best: dict[int, Plan]) -> Plan | None:
    return min(best.values(), key=lambda plan: plan.time.total, default=None)


def draw(strong: dict[str, Any], weak: dict[str, Any], path: Path) -> None:
    """Speed over GPUs: the best layout, each TP, and the ideal."""
    figure, axes = plt.subplots(2, len(MODELS), figsize=(13, 7), sharex=True)
    for column, (model, title) in enumerate(MODELS.items()):
        upper, lower = axes[0][column], axes[1][column]
        for tensor in TENSOR:
            line = [
                (g, best[tensor].samples_per_second) for g, best in strong[model].items() if tensor in best
            ]
            if line:
                upper.plot(*zip(*line), marker=".", linewidth=1, label=f"TP {tensor}")
        first = fastest(strong[model][GPUS[0]])
        assert first is not None
        upper.plot(GPUS, [first.samples_per_second * g / 8 for g in GPUS], "k:", linewidth=1, label="ideal")
        upper.set(title=f"{title}, {STRONG_BATCH:,} samples a step", yscale="log", xscale="log")
        line = [
            (g, plan.samples_per_second / g) for g, best in weak[model].items() if (plan := fastest(best))
        ]
        lower.plot(*zip(*line), marker=".", color="tab:blue")
        lower.set(title=f"{WEAK_SAMPLES} samples a step for each GPU", xscale="log", xlabel="GPUs")
        lower.set_ylim(0, 1.2 * max(speed for _, speed in line))
    axes[0][0].set_ylabel("samples/s (predicted)")
    axes[1][0].set_ylabel("samples/s for each GPU (predicted)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})


def rows(found: dict[int, dict[int, Plan]]) -> str:
    """A table over GPUs."""
    lines = [
        "| GPUs | samples/s | per GPU | best layout | GiB | answers | bubble | reduction |",
        "|" + "---|" * 8,
    ]
    for gpus, best in found.items():
        plan = fastest(best)
        if plan is None:
            lines.append(f"| {gpus:,} | none possible | | | | | | |")
            continue
        time = plan.time
        shares = " | ".join(
            f"{part / time.total:.1%}" for part in (time.answers, time.bubble, time.reduction)
        )
        lines.append(
            f"| {gpus:,} | {plan.samples_per_second:,.1f} | {plan.samples_per_second / gpus:.2f} | {name(plan)}, "
            f"{plan.recipe.train.points_per_micro_batch} points | {plan.memory.total / 2**30:.0f} | {shares} |"
        )
    return "\n".join(lines)


def where_tensor_stops(found: dict[int, dict[int, Plan]]) -> str:
    """At how many GPUs some TP is the fastest, in words."""
    winners = {gpus: min(best, key=lambda t: best[t].time.total) for gpus, best in found.items() if best}
    parts = []
    for tensor in sorted(set(winners.values())):
        sizes = [gpus for gpus, winner in winners.items() if winner == tensor]
        parts.append(f"TP {tensor} at {', '.join(f'{n:,}' for n in sizes)} GPUs")
    return "; ".join(parts)


def validation() -> str:
    """How the order of layouts compares with a measured one."""
    file = max(RESULTS.glob("*-cpu-plan-layouts.json"))  # names begin with the date
    content = json.loads(file.read_text())
    process = process_of(content["constants"])
    names, measured = zip(*((row["layout"], row["measured"]) for row in content["rows"]))
    now = [predicted(name, process) for name in names]  # by the model as it is, not as it was then
    rows = [[name, f"{was:.2f}", f"{told:.2f}"] for name, was, told in zip(names, measured, now)]
    words = (
        f"The order of {len(rows)} layouts of four gloo processes on a CPU, measured and predicted from what such "
        "processes do by themselves in the same run (products, attention, additions, gathers), has a rank "
        f"correlation (Spearman) of {spearman(list(measured), now):.2f}: {link(file.name)}, `{content['command']}`. "
        f"The processes shared {content['cores']} cores (load before: {content['load_average_before']:.1f}), where a "
        "process that waits in a pipeline's bubble lends its core to another; a GPU does not, and the model does not "
        "count it."
    )
    return "\n".join([words, "", *table(["layout", "measured s", "predicted s"], rows)])


def recomputation() -> str:
    """Memory and speed of one GPU with ever more of it."""
    case = case_of(ALONE, 1, 16)
    none, light, full = recomputations(case.recipe.model)
    kinds = {
        "none": none,
        "norms, activations, q, k and v": light,
        "every second layer": replace(full, recompute_every=2),
        "every layer": full,
    }
    rows = []
    for words, model in kinds.items():
        train = [replace(case.recipe.train, micro_batch_size=4, points_per_micro_batch=n) for n in POINTS]
        plans = [plan_of(case, replace(case.recipe, model=model, train=settings), 1) for settings in train]
        rows.append(
            [
                words,
                *(f"{plan.memory.total / 2**30:.0f}" for plan in plans),
                *(f"{plan.samples_per_second:.2f}" for plan in plans),
            ]
        )
    head = ["computed again", *(f"GiB, {n} points" for n in POINTS), *(f"samples/s, {n}" for n in POINTS)]
    return "\n".join(table(head, rows))


def page(strong: dict[str, Any], weak: dict[str, Any]) -> str:
    """The whole page."""
    sections = []
    for model, title in MODELS.items():
        sections.append(
            f"## {title}\n\n### Strong scaling: {STRONG_BATCH:,} samples a step on any number of GPUs\n\n"
            f"{rows(strong[model])}\n\nPredicted to be fastest: {where_tensor_stops(strong[model])}.\n\n"
            f"### Weak scaling: {WEAK_SAMPLES} samples a step for each GPU\n\n{rows(weak[model])}\n\n"
            f"Predicted to be fastest: {where_tensor_stops(weak[model])}."
        )
    return (
        "\n\n".join(
            [
                HEAD,
                "```\n" + check() + "\n```",
                validation(),
                "![Predicted speed](scaling.png)",
                *sections,
                f"## {MODELS[ALONE]} on one GPU: what is computed again\n\n{recomputation()}",
                TAIL,
            ]
        )
        + "\n"
    )


HEAD = """\
# Scaling, as a model predicts it

**Every number on this page is a prediction, but for the measured columns of the first two tables: one GPU's, and those
of four processes on a CPU. Nothing here was ever run on more than one GPU.** The page is written by
`python tools/scaling_page.py`; the model is the one of `tools/plan_layout.py`, whose constants stand in
[tools/plan/hardware.py](../tools/plan/hardware.py), each with its source or with the words "not measured": those of
NVLink and the network are among the latter.

The case is SOAR with six auxiliary points at 512 px (1,024 image tokens, and 154 of text, 512 with FLUX) in bf16, with
CUDA graphs, on H100s with 80 GB, eight in a node, with one 400 Gbit/s card for each. All weights are trained. The best
layout is the best of the megatron engine; `tools/plan_layout.py` tries DeepSpeed's ZeRO as well, which may be faster.

## How well the model fits what was measured"""

TAIL = """\
## What this says

- The column `answers` is what SOAR's rollout costs on top of training on the same points: a forward without gradient of
  two rows (both branches of guidance; one with FLUX, which is told its scale) for each sample, against seven points
  with a backward.
- Norms, activations, and q, k and v are made again by kernels that wait for memory alone, a whole layer by its matrix
  products too. `recompute light` in the tables is the former ([cluster.md](cluster.md#which-layout)). The last table
  also shows what does not fit on a GPU of 80 GB.
- A replica has at least one sample, so a batch of 2,048 samples does not spread over more than 2,048 replicas: beyond
  that only TP, PP and CP divide a step further.
- Tensor parallelism pays when nothing else divides: its gathers and scatters are not hidden behind computation in this
  model, and products of a part of the features fill a GPU less well.
- Left out: stragglers, reading data, checkpoints and measurements, and that collectives which hide behind computation
  slow it down. All of them grow with the number of GPUs, so large runs will be slower than this page says."""


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    start_process()
    strong = {m: {g: best_by_tensor(case_of(m, g, STRONG_BATCH)) for g in GPUS} for m in MODELS}
    weak = {m: {g: best_by_tensor(case_of(m, g, WEAK_SAMPLES * g)) for g in GPUS} for m in MODELS}
    draw(strong, weak, DOCS / "scaling.png")
    (DOCS / "scaling.md").write_text(page(strong, weak))


if __name__ == "__main__":
    main()
