"""soar-mega evaluate"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from soar_mega.cli.adapted import split_adapted

MARK = b"soar-mega evaluate"  # in what it writes
HELP = """\
Measure pipeline folders and compare them.

  soar-mega evaluate recipes/tiny/base runs/demo/soar/export --held-out runs/demo/shards/heldout
  soar-mega evaluate base=recipes/tiny/base soar=runs/x/export --guidance-scale 1 --guidance-scale 3 --out metrics.json
  soar-mega evaluate base=recipes/tiny/base lora=recipes/tiny/base+runs/x/export_lora

Pipelines that draw the built-in canvases (16 x 16 pixels) get the benchmark score (six GenEval-like categories and OCR,
read by a verifier that is independent of the generator) and the energy distance to real held-out canvases, once per
guidance scale. With --held-out, shards that no run was trained on, any pipeline gets its drift: the error of the
velocity where the pipeline's own sampler leads, absolute and relative to the error on the ray. SOAR trains on something
close to drift, so read it beside a metric that no method trains on.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "evaluate",
        help="measure pipeline folders and compare them",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pipelines", nargs="+", metavar="[NAME=]PIPELINE[+ADAPTERS]", help="diffusers pipeline folders"
    )
    parser.add_argument("--out", default="metrics.json", help="the JSON file to write (default: %(default)s)")
    parser.add_argument(
        "--held-out", default="", metavar="SHARDS", help="held-out shard folder: also measure drift"
    )
    parser.add_argument(
        "--guidance-scale", type=float, action="append", help="give it again for more (default: 1 and 4.5)"
    )
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (default: %(default)s)")
    parser.add_argument("--prompts-per-category", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--drift-samples", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument(
        "--drift-steps", type=int, default=5, help="Euler steps of a span (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's scheduler's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    pipelines = _named(arguments.pipelines)
    for name in ("steps", "prompts_per_category", "drift_samples", "drift_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.seed < 0:
        raise ValueError("--seed must be at least 0")
    if not all(math.isfinite(scale) for scale in arguments.guidance_scale or ()):
        raise ValueError(f"--guidance-scale must be a number, not {arguments.guidance_scale}")

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.outputs import check_file, write_file

    check_file(arguments.out, MARK)  # before anything is computed

    from soar_mega.evaluation.pipelines import Plan, evaluate_pipeline, evaluate_real

    plan = Plan(
        guidance_scales=arguments.guidance_scale or (1.0, 4.5),
        steps=arguments.steps,
        prompts_per_category=arguments.prompts_per_category,
        seed=arguments.seed,
        held_out=arguments.held_out,
        drift_samples=arguments.drift_samples,
        drift_steps=arguments.drift_steps,
        dtype=arguments.dtype,
        shift=arguments.shift,
    )
    measured = {
        name: evaluate_pipeline(folder, plan, adapters) for name, (folder, adapters) in pipelines.items()
    }
    report: dict[str, Any] = {
        "written_by": MARK.decode(),
        "plan": dataclasses.asdict(plan),
        "pipelines": measured,
    }
    if any("guidance" in each for each in measured.values()):
        report["real"] = evaluate_real(plan)
    print("\n".join(table(report)))
    write_file(arguments.out, json.dumps(report, indent=1).encode() + b"\n", MARK)
    print(f"\nall numbers are in {arguments.out}")
    return 0


def _named(pipelines: list[str]) -> dict[str, tuple[str, str]]:
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


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines: a row per pipeline, guidance scale and drift span, each with its standard error."""
    lines = []
    width = max(len(name) for name in report["pipelines"]) + 2
    drawn = {name: each["guidance"] for name, each in report["pipelines"].items() if "guidance" in each}
    if drawn:
        lines += [f"{'benchmark':<{width}} guidance  score        energy distance"]
        for name, scales in drawn.items():
            for scale, values in scales.items():
                score, energy = values["benchmark"]["overall"], values["energy_distance"]
                lines.append(
                    f"{name:<{width}} {scale:>8}  {score['mean']:.3f} +- {score['standard_error']:.3f}"
                    f"  {energy['value']:.3f} +- {energy['standard_error']:.3f}"
                )
        real = report["real"]
        lines.append(
            f"{'real canvases':<{width}}           {real['benchmark']['overall']['mean']:.3f} "
            f"(the verifier tells {real['verifier_accuracy']:.3f} of unseen digits right)"
        )
    drifts = {name: each["drift"] for name, each in report["pipelines"].items() if "drift" in each}
    if drifts:
        lines += ["", f"{'drift':<{width}} sigma           error            relative to on-ray"]
        for name, drift in drifts.items():
            for span in drift["spans"]:
                lines.append(
                    f"{name:<{width}} {span['from']:.2f} -> {span['to']:.2f}    "
                    f"{span['absolute']:.4f} +- {span['standard_error']:.4f}  {span['relative']:.3f}"
                )
    return lines
