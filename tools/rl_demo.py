"""SOAR first, then RL, in one command: two starts, two methods, and how they went.

    make rl-demo                            about eleven minutes on two cores; runs/rl/report.html
    python tools/rl_demo.py --quick         a few steps of everything; the numbers mean nothing

It prepares shards, runs recipes/chains/tiny_rl.yaml with `soar-mega chain`, and judges every model with
`soar-mega evaluate` on prompts that no run has seen. A step that is finished is not repeated, and a run that was
interrupted goes on: remove runs/rl to start again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from report.rl_page import write_rl_report
from walk.commands import logged, run_together, soar_mega, torchrun
from walk.curves import curves
from walk.data import prepare_data
from walk.steps import Steps, run_tool
from walk.work import forward_units

from soar_mega.launch.chain import Chain, Link, load_chain
from soar_mega.stages import CollectingConfig

CHAIN = Path("recipes/chains/tiny_rl.yaml")
FOLDER = Path("runs/rl")  # the chain's file names it
STEPS = ("data", "chain", "evaluation", "report")
CURVES = ("reward/total", "reward/std-within-groups", "validation/reward/total", "drift/")


class RlDemo:
    """The steps of the demo, in order, in one folder."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.folder = FOLDER.with_name("rl-quick") if quick else FOLDER
        self.steps = Steps(self.folder, STEPS)
        self.chain: Chain = load_chain(self.chain_file())

    def run(self) -> None:
        take = self.steps.take
        take("data", "drawing captioned pictures and encoding them into shards", self.prepare)
        names = ", ".join(link.name for link in self.chain.links)
        take("chain", f"training, one after the other on two processes: {names}", self.train)
        take("evaluation", "judging every model on prompts that no run has seen", self.evaluate)
        take("report", "writing the report", self.report)

    def chain_file(self) -> Path:
        """The shipped chain, or for --quick a copy with few steps in a folder of its own."""
        if not self.quick:
            return CHAIN
        content = yaml.safe_load(CHAIN.read_text().replace(f"{FOLDER}/", f"{self.folder}/"))
        for link in content["links"]:
            link["overrides"] = [*link["overrides"], "train.train_iters=2", "logging.eval_interval=2"]
            if "/tiny/sft" not in link["train"] and "/tiny/soar" not in link["train"]:
                link["overrides"] += ["stage.prompts_per_collection=8", "logging.drift_interval=0"]
        path = self.folder / "chain.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def prepare(self) -> None:
        train, held_out = (192, 48) if self.quick else (4000, 128)
        prepare_data(self.folder, self.chain.pipeline_dir, train, held_out, threads=1)

    def train(self) -> None:
        words = ("chain", str(self.chain.file), "--processes", "2")
        run_together([logged(self.folder, "chain", soar_mega(*words))])

    def evaluate(self) -> None:
        models = [f"base={self.chain.pipeline_dir}"]
        models += [f"{link.name}={newest_weights(link)}" for link in self.chain.links]
        suite = "recipes/evaluation/digits.yaml" if self.quick else "recipes/evaluation/tiny_rl.yaml"
        # without drift, which the runs have measured as they went
        words = ["evaluate", *models, "--suite", suite, "--out", str(self.folder / "evaluation")]
        words += ["--batch-size", "32"]
        run_together([logged(self.folder, "evaluation", torchrun(2, *words))])

    def report(self) -> None:
        judged = json.loads((self.folder / "evaluation" / "report.json").read_text())
        runs = {link.name: self.description(link) for link in self.chain.links if is_rl(link)}
        found = {"runs": runs, "judged": judged, "seconds": self.steps.seconds}
        (self.folder / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
        pictures = {name: newest_collections(Path(run["folder"])) for name, run in runs.items()}
        write_rl_report(found, pictures, self.folder / "report.html")

    def description(self, link: Link) -> dict[str, Any]:
        """What the page tells of an RL run."""
        assert link.recipe is not None and isinstance(link.recipe.stage, CollectingConfig)
        stage, train = link.recipe.stage, link.recipe.train
        return {
            "folder": str(link.folder),
            "stage": stage.name,
            "start": link.parent,
            "iterations": train.train_iters,
            "samples_per_iteration": train.global_batch_size,
            "forwards_per_sample": forward_units(stage),
            "curves": curves(link.folder, CURVES),
        }


def is_rl(link: Link) -> bool:
    return link.recipe is not None and link.recipe.stage.collects


def newest_weights(link: Link) -> Path:
    """The export of a training link: of its EMA, where it has one."""
    assert link.recipe is not None
    return link.folder / "export_ema" if link.recipe.train.ema_decay else link.product


def newest_collections(run: Path) -> list[Path]:
    """The pictures of a run's first and last collection."""
    found = sorted((run / "collections").glob("iter_*.png"))
    return found if len(found) < 2 else [found[0], found[-1]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything; the numbers mean nothing"
    )
    arguments = parser.parse_args()
    return run_tool("rl-demo", lambda: RlDemo(arguments.quick))


if __name__ == "__main__":
    sys.exit(main())
