"""soar-mega launch"""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega.cli.overrides import take_overrides

if TYPE_CHECKING:
    from soar_mega.config import Recipe

HELP = """\
Submit a training run to SLURM. It is requeued until it is complete: at its time limit, when it is preempted, when a
node fails; each time it goes on from its last checkpoint.

  soar-mega launch slurm recipes/sd35_medium/soar.yaml --nodes 4 --time 04:00:00 --partition h100 --dry-run
  soar-mega launch slurm recipes/sd35_medium/soar.yaml --nodes 4 parallel.tensor_model_parallel_size=2
  soar-mega launch slurm recipes/sd35_medium/soar.yaml --nodes 1 --sweep learning_rates.txt

The job script is a template of recipes/slurm, filled in; --dry-run prints it. It and the logs are in the run folder's
slurm/. Network and offline settings are in recipes/slurm/environment.sh.

Each line of a --sweep file holds the overrides of one run, an element of a job array, whose folder is
<run folder>/0, /1, ...
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "launch",
        help="submit a training run to SLURM",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scheduler", choices=("slurm",))
    parser.add_argument("recipe", help="a YAML recipe, for example recipes/tiny/soar.yaml")
    take_overrides(parser)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes-per-node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, help="(default: one per process; 0 without GPUs)")
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        help="per process (default: data.num_workers + 4, what a rank keeps busy)",
    )
    parser.add_argument("--time", default="04:00:00", help="limit of one start (default: %(default)s)")
    parser.add_argument(
        "--signal-seconds", type=int, default=300, help="save so long before the limit (default: %(default)s)"
    )
    parser.add_argument("--retries", type=int, default=0, help="requeue after so many failures (default: 0)")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="more options: --sbatch=--qos=high"
    )
    parser.add_argument("--template", default="venv", help="venv, container or a file (default: %(default)s)")
    parser.add_argument("--image", default="", help="container image, with --template container")
    parser.add_argument("--python", default="", help="interpreter on the nodes (default: this one)")
    parser.add_argument("--sweep", metavar="FILE", help="overrides of one run per line: a job array")
    parser.add_argument("--dry-run", action="store_true", help="print the job script and submit nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from soar_mega.launch import slurm
    from soar_mega.launch.job_checks import check_data, check_fit, check_model
    from soar_mega.stages import load_recipe

    names = [field.name for field in dataclasses.fields(slurm.Resources)]
    wanted = slurm.Resources(**{name: getattr(arguments, name) for name in names})

    def check(recipe: "Recipe") -> None:
        check_fit(recipe, wanted.processes)
        check_model(recipe)
        check_data(recipe)

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    save = Path(recipe.checkpoint.save)
    sweep: list[tuple[list[str], Path]] = []
    recipes = []
    for where, words in read_sweep(arguments.sweep):
        folder = save / str(len(sweep))
        if any(word.startswith("checkpoint.save=") for word in words):
            raise ValueError(
                f"{where}: checkpoint.save: each run of a sweep has its own folder, this one {folder}"
            )
        words = [*words, f"checkpoint.save={folder}"]
        try:
            recipes.append(load_recipe(arguments.recipe, [*arguments.overrides, *words]))
            check(recipes[-1])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        sweep.append((words, folder / "complete.json"))
    if not sweep:
        check(recipe)
    job = slurm.Job(
        name=save.name,
        arguments=["train", arguments.recipe, *arguments.overrides],
        marker=save / "complete.json",
        num_workers=max(each.data.num_workers for each in recipes or [recipe]),
        sweep=sweep,
    )
    if arguments.dry_run:
        print(slurm.render(job, wanted), end="")
        return 0
    running = slurm.queued(job.folder)
    if running is not None:
        raise ValueError(f"{save} is the folder of job {running}: wait for it, or end it with scancel")
    number = slurm.submit(job, wanted)
    print(f"job {number}: {job.folder}/job.sbatch, logs beside it")
    return 0


def read_sweep(path: str | None) -> list[tuple[str, list[str]]]:
    """Where the overrides of each run stand, and what they are, one line each; blank lines and # comments do not count.

    ValueError: there are none, or a quote is left open.
    """
    if path is None:
        return []
    runs = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
        if words:
            runs.append((f"{path}: line {number}", words))
    if not runs:
        raise ValueError(f"{path}: no runs; write the overrides of one run per line, as in optimizer.lr=1e-5")
    return runs
