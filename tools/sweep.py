"""Trains the arms of a sweep, evaluates them together and writes one page.

    python tools/sweep.py recipes/tiny/study.yaml             everything; goes on where it was interrupted
    python tools/sweep.py recipes/tiny/study.yaml --list      what would be trained, with its computation
    python tools/sweep.py recipes/tiny/screening.yaml --choose recipes/tiny/study.yaml
                                                              puts a screening's choice into the file of its study
    python tools/sweep.py my_sweep.yaml --slurm               a job array of the runs that are missing: submit it, and
                                                              when it is through, the first command evaluates

A sweep is a YAML file (tools/sweeping/plan.py, docs/study.md): arms as recipes with overrides, their seeds and budgets
in steps or in forwards, what is measured, which arm is compared with which. What is done is skipped, and nothing is
ever removed. Results: FOLDER/report.{json,html,md,png}, or --out.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from sweeping.canvases import prepare
from sweeping.choice import choice, put_into
from sweeping.outcomes import Evaluated
from sweeping.page import curves_figure, write_markdown, write_page
from sweeping.plan import WRITTEN_BY, Sweep, read_sweep
from sweeping.results import results
from sweeping.runs import chains, evaluation_folders, job_script, runs_of
from walk.commands import end_on_sigterm, run_together

from soar_mega.outputs import check_file, write_file

MARK = WRITTEN_BY.encode()


def listing(sweep: Sweep) -> str:
    """A line for each arm."""
    lines = [f"{'arm':24}{'steps':>8}{'units a step':>14}{'units':>10}  seeds"]
    for arm in sweep.arms:
        work = arm.iterations * arm.units
        lines.append(
            f"{arm.name:24}{arm.iterations:8}{arm.units:14g}{work:10g}  {', '.join(map(str, arm.seeds))}"
        )
    total = sum(arm.iterations * arm.units * len(arm.seeds) for arm in sweep.arms)
    return "\n".join([*lines, f"{total:g} forward units in all, of which a backward is two"])


def write_script(sweep: Sweep) -> None:
    """The job array of what is missing."""
    script, missing = job_script(sweep, runs_of(sweep))
    if not missing:
        print("all runs are complete")
        return
    path = sweep.folder / "slurm" / "job.sbatch"
    write_file(path, script.encode() + b"# written by " + MARK + b"\n", MARK)
    print(f"{missing} runs: sbatch {path}")


def choose(screening: Path, results_file: Path, study: Path) -> None:
    """Replaces the chosen arm and its control in a study's file."""
    if not results_file.is_file():
        raise ValueError(
            f"{results_file} is not there: run the screening first, or name its results with --out"
        )
    chosen = choice(json.loads(results_file.read_text()), screening)
    study.write_text(put_into(study.read_text(encoding="utf-8"), chosen), encoding="utf-8")
    print(
        f"{study}: {chosen.arm} {chosen.overrides} and its control {chosen.control} {chosen.control_overrides}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="a YAML file")
    parser.add_argument("--list", action="store_true", help="show the arms and do nothing")
    parser.add_argument("--slurm", action="store_true", help="write a job array and train nothing here")
    parser.add_argument("--evaluate", action="store_true", help="train nothing here: all runs are complete")
    parser.add_argument("--choose", type=Path, metavar="STUDY", help="of a screening that is through")
    parser.add_argument("--at-once", type=int, default=2, help="processes here (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results, without an ending (default: FOLDER/report)")
    arguments = parser.parse_args()
    end_on_sigterm()
    os.chdir(Path(__file__).parents[1])  # recipes name their files from here
    try:
        sweep = read_sweep(arguments.sweep)
        if arguments.list:
            print(listing(sweep))
            return 0
        out = arguments.out or sweep.folder / "report"
        files = {ending: out.with_name(f"{out.name}.{ending}") for ending in ("json", "html", "md", "png")}
        if arguments.choose:
            choose(Path(arguments.sweep), files["json"], arguments.choose)
            return 0
        for file in files.values():
            check_file(file, MARK)
        if sweep.canvases is not None:
            prepare(sweep.folder, sweep.base, sweep.canvases, arguments.at_once)
        if arguments.slurm:
            write_script(sweep)
            return 0
        runs = runs_of(sweep)
        missing = [run for run in runs if not run.is_done()]
        if arguments.evaluate and missing:
            raise ValueError(f"not complete: {', '.join(run.name for run in missing)}")
        print(f"{len(missing)} of {len(runs)} runs to do, {arguments.at_once} at a time", flush=True)
        run_together(*chains(sweep, runs), at_once=arguments.at_once)
        result = results(sweep, Evaluated(evaluation_folders(sweep, runs)))
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        print(f"\nsweep: {error}", file=sys.stderr)
        return 1
    write_file(files["json"], json.dumps(result, indent=1).encode() + b"\n", MARK)
    write_file(files["html"], write_page(result, out), MARK)
    write_file(files["md"], write_markdown(result).encode(), MARK)
    write_file(files["png"], curves_figure(result, sweep.primary[0]), MARK)
    print(f"\n{listing(sweep)}\n\nWritten to {', '.join(map(str, files.values()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
