"""Measures pipelines that draw canvases, and real canvases beside them.

  python -m soar_mega.examples.digits base=recipes/tiny/base soar=runs/x/export --held-out runs/x/heldout

Each gets the benchmark score (six GenEval-like categories and OCR, read by a verifier that is independent of the
generator) and the energy distance to real held-out canvases, once per guidance scale; with --held-out also its drift.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from soar_mega.cli.evaluate import MARK, add_drift_options, drift_table, named_pipelines
from soar_mega.cli.numbers import check_at_least_one, check_guidance_scales
from soar_mega.cli.process import start_process


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m soar_mega.examples.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipelines", nargs="+", metavar="[NAME=]PIPELINE[+ADAPTERS]")
    parser.add_argument("--out", default="metrics.json", help="(default: %(default)s)")
    add_drift_options(parser)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument("--prompts-per-category", type=int, default=60, help="(default: %(default)s)")
    return parser.parse_args(argv)


def measure_all(arguments: argparse.Namespace) -> None:
    """Writes the file, and prints its table."""
    check_at_least_one(arguments, "steps", "prompts_per_category", "drift_samples", "drift_steps")
    check_guidance_scales(arguments.guidance_scale or ())
    pipelines = named_pipelines(arguments.pipelines)
    start_process()

    from soar_mega.examples.digits.measures import Plan, measure, measure_real
    from soar_mega.outputs import check_file, write_file

    check_file(arguments.out, MARK)  # before anything is computed
    plan = Plan(
        guidance_scales=arguments.guidance_scale or Plan.guidance_scales,
        steps=arguments.steps,
        prompts_per_category=arguments.prompts_per_category,
        held_out=arguments.held_out,
        drift_samples=arguments.drift_samples,
        drift_steps=arguments.drift_steps,
    )
    report = {
        "written_by": MARK.decode(),
        "plan": dataclasses.asdict(plan),
        "pipelines": {
            name: measure(folder, plan, adapters) for name, (folder, adapters) in pipelines.items()
        },
        "real": measure_real(plan),
    }
    print("\n".join([*table(report), "", *drift_table(report)]))
    write_file(arguments.out, json.dumps(report, indent=1).encode() + b"\n", MARK)
    print(f"\nall numbers are in {arguments.out}")


def table(report: dict[str, Any]) -> list[str]:
    """A line for each pipeline and guidance scale, each number with its standard error."""
    width = max(len(name) for name in report["pipelines"]) + 2
    lines = [f"{'benchmark':<{width}} guidance  score        energy distance"]
    for name, measured in report["pipelines"].items():
        for scale, values in measured["guidance"].items():
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
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        measure_all(arguments)
    except (ValueError, OSError) as error:
        print(f"digits: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
