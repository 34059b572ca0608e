"""Does SOAR help the built-in model? Three seeds, at equal optimizer steps and at equal computation.

    make study                           half an hour to an hour on two cores; goes on where it was interrupted
    python tools/study.py --quick        a few steps of everything; the numbers mean nothing

Arms at equal steps: SFT, control, SOAR. At equal computation: SFT and control with as many steps more as
they cost less, by counted floating-point operations. Every run starts from the same base model; a seed sets
the order of the data and all noise of training, and is shared by the arms, so differences between arms are
paired over seeds. Captions, starting noise and held-out states of the evaluation are the same for all.

Writes benchmarks/results/<date>-cpu-study.json and a .png beside it.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from report.noise import Difference, paired_difference
from report.study_figure import study_figure
from walk.commands import Command, end_on_sigterm, run_together, soar_mega
from walk.data import prepare_data

from soar_mega.stages import load_recipe

BASE = Path("recipes/tiny/base")
GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of everything, the same for all arms."""

    seeds: tuple[int, ...] = (1, 2, 3)
    canvases: int = 4000
    held_out: int = 256
    iterations: int = 200
    prompts_per_category: int = 120
    drift_samples: int = 256


QUICK = Plan(seeds=(1, 2), canvases=192, held_out=48, iterations=2, prompts_per_category=3, drift_samples=32)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A recipe and its length. `work` is floating-point operations of training, in those of one SOAR step."""

    name: str
    recipe: str
    iterations: int
    work: float


def plan_arms(iterations: int, flops: Mapping[str, int]) -> list[Arm]:
    """Three arms with equal steps, and two more with the computation of SOAR.

    Args:
        flops: floating-point operations of a step of each recipe.
    """
    work = {recipe: count / flops["soar"] for recipe, count in flops.items()}
    equal = [
        Arm(name=recipe, recipe=recipe, iterations=iterations, work=iterations * work[recipe])
        for recipe in ("sft", "sft_multi", "soar")
    ]
    longer = []
    for recipe in ("sft", "sft_multi"):
        steps = round(iterations / work[recipe])
        longer.append(Arm(name=f"{recipe}_long", recipe=recipe, iterations=steps, work=steps * work[recipe]))
    return [*equal, *longer]


def count_step_flops() -> dict[str, int]:
    """Floating-point operations of one optimizer step of each tiny recipe, counted by PyTorch."""
    from baseline.case import make_case
    from baseline.our_arm import OurArm
    from baseline.worker import count_flops

    flops = {}
    for name in ("sft", "sft_multi", "soar"):
        recipe = load_recipe(f"recipes/tiny/{name}.yaml", [])
        size = recipe.train.global_batch_size
        arm = OurArm(make_case("tiny", stage=recipe.stage, batch_size=size), size, size)
        flops[name] = count_flops(arm.step)
    return flops


class Study:
    """The runs of a study, in one folder."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.arms: list[Arm] = []

    def run(self) -> dict[str, Any]:
        """Everything that is not there yet; then the result."""
        cores = os.cpu_count() or 1
        if not (self.folder / "shards" / "heldout" / "dataset.json").exists():
            print("preparing the data ...", flush=True)
            plan = self.plan
            prepare_data(self.folder, BASE, plan.canvases, plan.held_out, max(1, cores // 2))
        flops = count_step_flops()
        self.arms = plan_arms(self.plan.iterations, flops)
        # The longest first: they would otherwise keep one core busy at the end.
        runs = sorted(
            ((arm, seed) for arm in self.arms for seed in self.plan.seeds), key=lambda run: -run[0].work
        )
        chains = [self.chain(arm, seed) for arm, seed in runs]
        if not self.evaluated("base").exists():
            chains.append([self.evaluation("base", BASE)])
        missing = [chain for chain in chains if chain]
        print(f"{len(missing)} of {len(runs) + 1} runs to do, {cores} at a time", flush=True)
        run_together(*missing, at_once=cores)
        return self.result(flops)

    def chain(self, arm: Arm, seed: int) -> list[Command]:
        """Training and evaluation of a run, without what is finished."""
        name = f"{arm.name}-{seed}"
        run = self.folder / name
        commands = []
        if not (run / "complete.json").exists():
            commands.append(self.training(arm, seed, run))
        if not self.evaluated(name).exists():
            commands.append(self.evaluation(name, run / "export_ema"))
        return commands

    def training(self, arm: Arm, seed: int, run: Path) -> Command:
        arguments = soar_mega(
            "train",
            f"recipes/tiny/{arm.recipe}.yaml",
            f"checkpoint.save={run}",
            f"data.path={self.folder}/shards/train",
            f"train.seed={seed}",
            f"train.train_iters={arm.iterations}",
            *("logging.eval_interval=0", "logging.drift_interval=0", "logging.sample_interval=0"),
        )
        return self.command(f"{arm.name}-{seed}", arguments)

    def evaluation(self, name: str, pipeline_dir: Path) -> Command:
        arguments = soar_mega(
            *("evaluate", f"{name}={pipeline_dir}", "--held-out", f"{self.folder}/shards/heldout"),
            *("--guidance-scale", "1", "--guidance-scale", f"{GUIDANCE:g}"),
            *("--prompts-per-category", str(self.plan.prompts_per_category)),
            *("--drift-samples", str(self.plan.drift_samples), "--out", str(self.evaluated(name))),
        )
        return self.command(f"evaluate-{name}", arguments)

    def command(self, name: str, arguments: list[str]) -> Command:
        return Command(name=name, arguments=arguments, log=self.folder / "logs" / f"{name}.log", threads=1)

    def evaluated(self, name: str) -> Path:
        return self.folder / "evaluations" / f"{name}.json"

    def result(self, flops: Mapping[str, int]) -> dict[str, Any]:
        """All numbers, per run and summed up."""
        base = read_measurements(self.evaluated("base"), "base")
        runs = {
            arm.name: [
                read_measurements(self.evaluated(f"{arm.name}-{seed}"), f"{arm.name}-{seed}")
                for seed in self.plan.seeds
            ]
            for arm in self.arms
        }
        return {
            "tool": "study",
            "command": "make study",
            "date": str(date.today()),
            "torch": torch.__version__,
            "plan": asdict(self.plan),
            "guidance_scale": GUIDANCE,
            "step_flops": dict(flops),
            "arms": [asdict(arm) for arm in self.arms],
            "base": base,
            "runs": runs,
            "differences": compare(runs),
        }


def read_measurements(path: Path, name: str) -> dict[str, float]:
    """The numbers that are compared, of one `soar-mega evaluate` of one pipeline."""
    measured = json.loads(path.read_text())["pipelines"][name]
    strong, none = measured["guidance"][f"{GUIDANCE:g}"], measured["guidance"]["1"]
    numbers = {
        "score": strong["benchmark"]["overall"]["mean"],
        "score without guidance": none["benchmark"]["overall"]["mean"],
        "ocr": strong["benchmark"]["ocr"]["mean"],
        "energy distance": strong["energy_distance"]["value"],
        "energy distance without guidance": none["energy_distance"]["value"],
    }
    for span in measured["drift"]["scales"][f"{GUIDANCE:g}"]:
        numbers[f"drift {span['from']:g} to {span['to']:g}"] = span["absolute"]
    return numbers


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """SOAR minus every other arm, paired over seeds: {arm: {measurement: difference}}."""
    return {
        other: {
            name: describe(
                paired_difference([run[name] for run in theirs], [run[name] for run in runs["soar"]])
            )
            for name in theirs[0]
        }
        for other, theirs in runs.items()
        if other != "soar"
    }


def describe(difference: Difference) -> dict[str, Any]:
    return {**asdict(difference), "beyond_noise": difference.beyond_noise}


def print_table(result: Mapping[str, Any]) -> None:
    """Means over seeds with their spread, then what stands out."""
    names = list(result["base"])
    print(f"\n{'mean over seeds (min..max)':34}" + "".join(f"{arm:>22}" for arm in ("base", *result["runs"])))
    for name in names:
        cells = [f"{result['base'][name]:22.3f}"]
        for runs in result["runs"].values():
            values = [run[name] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})".rjust(22))
        print(f"{name:34}" + "".join(cells))
    print("\nSOAR minus the other arm, paired over seeds: mean +- standard error (* beyond noise, 95 %)")
    for other, differences in result["differences"].items():
        cells = [
            f"{name} {d['value']:+.3f} +- {d['standard_error']:.3f}{'*' if d['beyond_noise'] else ''}"
            for name, d in differences.items()
        ]
        print(f"  {other}: " + "; ".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="default: runs/study")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3)")
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/<date>-cpu-study.json)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything; the numbers mean nothing"
    )
    arguments = parser.parse_args()
    end_on_sigterm()
    os.chdir(Path(__file__).parents[1])  # recipes name their files from here
    plan = QUICK if arguments.quick else Plan()
    if arguments.seeds:
        plan = replace(plan, seeds=tuple(range(1, arguments.seeds + 1)))
    out = arguments.out or Path(f"benchmarks/results/{date.today()}-cpu-study.json")
    try:
        result = Study(arguments.folder, plan).run()
    except RuntimeError as error:
        print(f"\nstudy: {error}", file=sys.stderr)
        return 1
    print_table(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".png").write_bytes(study_figure(result))
    print(f"\nWritten to {out} and {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
