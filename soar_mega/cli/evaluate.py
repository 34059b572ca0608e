"""soar-mega evaluate"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from soar_mega.cli.adapted import split_adapted
from soar_mega.cli.numbers import check_at_least_one, check_guidance_scales

MARK = b"soar-mega evaluate"  # in what it writes
HELP = """\
Draw images with models, score them and compare.

  soar-mega evaluate base=models/stable-diffusion-3.5-medium soar=runs/x/export --suite paper \\
      --prompts data/prompts --weights models/scorers --max-sequence-length 128 --out runs/table
  soar-mega evaluate base=recipes/tiny/base run=runs/x --suite digits --out runs/x_evaluation
  soar-mega evaluate --watch runs/x --suite digits --out runs/x_evaluation

With --suite a MODEL is a pipeline folder, PIPELINE+ADAPTERS, a run or iter_ folder, or a pipeline of another
architecture that diffusers draws; @WIDTHxHEIGHT behind it is a size of its own. All processes of torchrun or srun draw:
each replica of a model has its share of the prompts. An image depends on its prompt and the number of its noise alone,
not on the processes. Each image and each score is in the folder --out as soon as it is made: start a killed evaluation
again and it goes on. report.html there compares all models; report.json, table.csv and outcomes.csv hold the numbers.

Without --suite, drift alone, of pipelines:

  soar-mega evaluate before=P after=runs/x/export --held-out data/train/held_out --out metrics.json

On --held-out, shards that no run was trained on, drift is the error of the velocity where the pipeline's own sampler
leads, absolute and relative to the error on the ray, at each guidance scale. SOAR trains on something close to it, so
read it beside a metric that no method trains on.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "evaluate",
        help="draw with models, score the images, compare",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODEL", help="what is measured")
    parser.add_argument("--out", help="with --suite the folder, else the JSON file (default: metrics.json)")
    add_drift_options(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's scheduler's)")
    parser.add_argument("--seed", type=int, help="of all noise (default: the suite's, or 0)")
    suite = parser.add_argument_group("with --suite")
    suite.add_argument(
        "--suite", metavar="FILE|NAME", help="a YAML file, or one of recipes/evaluation: paper, digits, tiny"
    )
    suite.add_argument(
        "--prompts", metavar="DIR", help="where the suite's prompts lie (default: beside its file)"
    )
    suite.add_argument("--steps", type=int, action="append", help="sampler steps; give it again for more")
    suite.add_argument("--weights", default="", metavar="DIR", help="where the scorers' weights lie")
    suite.add_argument("--watch", metavar="RUN", help="evaluate the checkpoints of a run as they appear")
    suite.add_argument(
        "--batch-size", type=int, default=8, help="images drawn together (default: %(default)s)"
    )
    suite.add_argument("--pipeline-dir", help="of checkpoints: take the encoders from this pipeline folder")
    suite.add_argument("--ema", action="store_true", help="the EMA weights of checkpoints")
    for name in ("tensor", "pipeline"):
        suite.add_argument(
            f"--{name}-model-parallel-size", type=int, default=1, help="of checkpoints (default: %(default)s)"
        )
    suite.add_argument(
        "--max-sequence-length",
        type=int,
        help="T5 tokens of a prompt, for all models (default: each model's own)",
    )
    parser.set_defaults(run=run)


def add_drift_options(parser: argparse.ArgumentParser) -> None:
    """Where drift is measured, and how."""
    parser.add_argument(
        "--held-out", default="", metavar="SHARDS", help="held-out shard folder: also measure drift"
    )
    parser.add_argument("--guidance-scale", type=float, action="append", help="give it again for more")
    parser.add_argument("--drift-samples", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument(
        "--drift-steps", type=int, default=5, help="Euler steps of a span (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.seed is not None and arguments.seed < 0:
        raise ValueError("--seed must be at least 0")
    if arguments.suite:
        from soar_mega.cli.evaluate_suite import run_suite

        return run_suite(arguments)
    if arguments.steps or arguments.watch:
        raise ValueError("--steps and --watch go with --suite")
    if not arguments.models:
        raise ValueError("no model: give [NAME=]PIPELINE[+ADAPTERS]")
    pipelines = named_pipelines(arguments.models)
    if not arguments.held_out:
        raise ValueError(
            "name a --suite to draw and score images, or --held-out SHARDS to measure drift alone"
        )
    check_at_least_one(arguments, "drift_samples", "drift_steps")
    check_guidance_scales(arguments.guidance_scale or ())
    return _measure_drift(pipelines, arguments)


def _measure_drift(pipelines: dict[str, tuple[str, str]], arguments: argparse.Namespace) -> int:
    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.outputs import check_file, write_file

    out = arguments.out or "metrics.json"
    check_file(out, MARK)  # before anything is computed

    from soar_mega.evaluation.pipeline_drift import Plan, measure_drift_alone

    plan = Plan(
        guidance_scales=arguments.guidance_scale or Plan.guidance_scales,
        seed=arguments.seed or 0,
        held_out=arguments.held_out,
        drift_samples=arguments.drift_samples,
        drift_steps=arguments.drift_steps,
        dtype=arguments.dtype,
        shift=arguments.shift,
    )
    report = {
        "written_by": MARK.decode(),
        "plan": dataclasses.asdict(plan),
        "pipelines": {
            name: measure_drift_alone(folder, plan, adapters)
            for name, (folder, adapters) in pipelines.items()
        },
    }
    print("\n".join(drift_table(report)))
    write_file(out, json.dumps(report, indent=1).encode() + b"\n", MARK)
    print(f"\nall numbers are in {out}")
    return 0


def named_pipelines(pipelines: list[str]) -> dict[str, tuple[str, str]]:
    """{name: (folder, adapters)} of NAME=FOLDER+ADAPTERS or less; a ValueError names what is missing or given twice."""
    named: dict[str, tuple[str, str]] = {}
    for text in pipelines:
        name, equals, folder = text.partition("=")
        if not equals:
            name, folder = text, text
        if name in named:
            raise ValueError(f"{name} is given twice: name pipelines apart, as in before=FOLDER after=FOLDER")
        folder, adapters = split_adapted(folder)
        if not (Path(folder) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} is not a diffusers pipeline folder: it has no model_index.json"
            )
        named[name] = folder, adapters
    return named


def drift_table(report: dict[str, Any]) -> list[str]:
    """A line for each pipeline, guidance scale and span of a report, with its standard error; none without drift."""
    drifts = {name: each["drift"] for name, each in report["pipelines"].items() if "drift" in each}
    if not drifts:
        return []
    width = max(map(len, drifts)) + 2
    lines = [f"{'drift':<{width}} guidance  sigma           error            relative to on-ray"]
    for name, drift in drifts.items():
        for scale, spans in drift["scales"].items():
            lines += [
                f"{name:<{width}} {scale:>8}  {span['from']:.2f} -> {span['to']:.2f}    "
                f"{span['absolute']:.4f} +- {span['standard_error']:.4f}  {span['relative']:.3f}"
                for span in spans
            ]
    return lines
