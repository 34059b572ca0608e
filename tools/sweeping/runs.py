"""The runs of a sweep: what each of them is told, which are done, and how the others are started.

Nothing is ever removed. A run folder with another recipe than its arm's is refused: runs of two plans do not mix.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from sweeping.plan import Arm, Sweep
from walk.commands import logged, run_together, soar_mega, torchrun

from soar_mega.checkpoints.run_folder import MARKER, RECIPE, RunFolder
from soar_mega.launch import slurm
from soar_mega.recipe import recipe_to_yaml
from soar_mega.stages import load_recipe


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    sweep: Sweep
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.sweep.folder / "runs" / self.name

    @property
    def marker(self) -> Path:
        """Written last."""
        return self.folder / MARKER

    @property
    def words(self) -> list[str]:
        """What `soar-mega train` is told: the recipe and all overrides."""
        words = [
            *self.arm.overrides,
            f"train.seed={self.seed}",
            f"train.train_iters={self.arm.iterations}",
            f"checkpoint.save={self.folder}",
        ]
        if self.curve:
            interval = math.gcd(*self.curve)  # meets all of them
            words += [f"checkpoint.save_interval={interval}", f"checkpoint.save_retain_interval={interval}"]
        if self.sweep.canvases is not None:
            words += [
                f"data.path={self.sweep.folder}/shards/train",
                f"data.validation_path={self.sweep.folder}/shards/heldout",
            ]
        return [self.arm.recipe, *words]

    @property
    def curve(self) -> list[int]:
        """The iterations at which it is evaluated, without its last."""
        return [iteration for iteration in self.sweep.curve if iteration < self.arm.iterations]

    def is_done(self) -> bool:
        """Whether the run is complete.

        Raises:
            ValueError: its folder holds a run with other settings.
        """
        recipe, *overrides = self.words
        written = self.folder / RECIPE
        if written.is_file() and written.read_text() != recipe_to_yaml(load_recipe(recipe, overrides)):
            raise ValueError(
                f"{self.folder} is a run with other settings than the arm {self.arm.name} has now: give the arm "
                "another name, or the sweep another folder"
            )
        return self.marker.is_file()

    @property
    def has_average(self) -> bool:
        """Whether an average of the weights is evaluated."""
        return load_recipe(self.arm.recipe, self.arm.overrides).train.ema_decay > 0

    def models(self) -> list[str]:
        """What is evaluated: NAME=MODEL, the checkpoints of the curve before the export."""
        found = [
            f"{curve_name(self.arm.name, iteration)}#{self.seed}={RunFolder(self.folder).checkpoint(iteration)}"
            for iteration in self.curve
        ]
        return [
            *found,
            f"{self.arm.name}#{self.seed}={self.folder}/export{'_ema' if self.has_average else ''}",
        ]


def curve_name(arm: str, iteration: int) -> str:
    """What an arm is called in an evaluation before its last iteration."""
    return f"{arm}.{iteration}"


def runs_of(sweep: Sweep) -> list[Run]:
    """All runs, those with the most work first: they would otherwise keep one core busy at the end."""
    runs = [Run(sweep, arm, seed) for arm in sweep.arms for seed in arm.seeds]
    return sorted(runs, key=lambda run: -run.arm.iterations * run.arm.units)


def train(runs: list[Run], at_once: int) -> None:
    """Trains runs, `at_once` at a time, each in one process.

    Raises:
        RuntimeError: one failed, with the end of its output; start again to go on.
    """
    chains = [[logged(run.sweep.folder, run.name, soar_mega("train", *run.words))] for run in runs]
    run_together(*chains, at_once=at_once)


def evaluate(sweep: Sweep, runs: list[Run], processes: int) -> Path:
    """Evaluates all runs and the base together, in a folder that goes on where it was; that folder."""
    folder = sweep.folder / "evaluation"
    models = [f"base={sweep.base}"] if sweep.base else []
    for arm in sweep.arms:
        models += [model for run in runs if run.arm is arm for model in run.models()]
    words = [*models, *sweep.evaluate, "--out", str(folder), *(["--ema"] if runs[0].has_average else [])]
    if sweep.canvases is not None:
        words += ["--prompts", f"{sweep.folder}/prompts", "--held-out", f"{sweep.folder}/shards/heldout"]
    arguments = torchrun(processes, "evaluate", *words) if processes > 1 else soar_mega("evaluate", *words)
    run_together([logged(sweep.folder, "evaluate", arguments)])
    return folder


def job_script(sweep: Sweep, runs: list[Run]) -> tuple[str, int]:
    """A job array of SLURM with an element for each run that is not done, and how many these are."""
    missing = [run for run in runs if not run.is_done()]
    wanted = slurm.resources(sweep.slurm, "slurm")
    job = slurm.Job(
        name=sweep.folder.name,
        arguments=["train"],
        marker=sweep.folder / MARKER,
        sweep=[(run.words, run.marker) for run in missing],
    )
    return slurm.render(job, wanted), len(missing)
