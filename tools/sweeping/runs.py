"""The runs of a sweep: what each of them is told, which are done, and the commands that do the others.

Nothing is ever removed. A run folder with another recipe than its arm's is refused: runs of two plans do not mix.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

from sweeping.plan import BASE, Arm, Sweep
from walk.commands import Command, logged, soar_mega

from soar_mega.checkpoints.run_folder import MARKER, RECIPE, RunFolder
from soar_mega.evaluation.suite.prompt_sets import read_prompt_set
from soar_mega.evaluation.suite.store import digest
from soar_mega.evaluation.suite.suite_settings import load_suite
from soar_mega.launch import slurm
from soar_mega.recipe import recipe_to_yaml
from soar_mega.stages import load_recipe

RECEIPT = "evaluated.txt"  # what an evaluation was told that is complete


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
    """All runs, the first seed of every arm before the second: what is interrupted has whole seeds.

    Of a seed those with the most work come first: they would otherwise keep one core busy at the end.
    """
    runs = [(i, Run(sweep, arm, seed)) for arm in sweep.arms for i, seed in enumerate(arm.seeds)]
    return [
        run
        for _, run in sorted(runs, key=lambda each: (each[0], -each[1].arm.iterations * each[1].arm.units))
    ]


def chains(sweep: Sweep, runs: list[Run]) -> list[list[Command]]:
    """What is left to do: the base's evaluation, and for each run its training and then its evaluation.

    Raises:
        ValueError: the suite that evaluations ask for, or one of its files of prompts, cannot be read.
    """
    asked = _asked(sweep)
    left = []
    if sweep.base:
        left.append([evaluation(sweep, asked, BASE, [f"{BASE}={sweep.base}"])])
    for run in runs:
        judging = evaluation(sweep, asked, run.name, run.models(), run.has_average)
        if run.is_done():
            left.append([judging])
        else:  # judged anew, also where an earlier run was
            left.append([logged(sweep.folder, run.name, soar_mega("train", *run.words)), judging])
    return [chain for chain in left if not chain[0].has_receipt()]


def evaluation(sweep: Sweep, asked: str, name: str, models: list[str], has_average: bool = False) -> Command:
    """Evaluates models in a folder of their own, which goes on where it was; `asked` as below."""
    folder = evaluation_folder(sweep, name)
    words = [*models, *sweep.evaluate, *(["--ema"] if has_average else []), *_canvas_words(sweep)]
    command = logged(sweep.folder, f"evaluate-{name}", soar_mega("evaluate", *words, "--out", str(folder)))
    return replace(command, receipt=(folder / RECEIPT, "\n".join([*words, f"# {asked}", ""])))


def _canvas_words(sweep: Sweep) -> list[str]:
    """What an evaluation is told of the sweep's own canvases, where it has such."""
    if sweep.canvases is None:
        return []
    return ["--prompts", f"{sweep.folder}/prompts", "--held-out", f"{sweep.folder}/shards/heldout"]


def _asked(sweep: Sweep) -> str:
    """A hash of the suite that a sweep's evaluations ask for, and of all that its files of prompts say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite")
    parser.add_argument("--prompts")
    known, _ = parser.parse_known_args([*sweep.evaluate, *_canvas_words(sweep)])
    if known.suite is None:
        return "no suite"
    suite = load_suite(known.suite, known.prompts)
    return digest({"suite": repr(suite), "prompts": [read_prompt_set(each).hash for each in suite.sets]})


def evaluation_folder(sweep: Sweep, name: str) -> Path:
    """Of a run, or of the base."""
    return sweep.folder / "evaluation" / name


def evaluation_folders(sweep: Sweep, runs: list[Run]) -> list[Path]:
    """All of them."""
    names = [*([BASE] if sweep.base else []), *(run.name for run in runs)]
    return [evaluation_folder(sweep, name) for name in names]


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
