"""soar-mega handoff"""

import argparse
from pathlib import Path

from soar_mega.cli.numbers import check_at_least_one
from soar_mega.handoff.trainers import MARK, TRAINERS, Trainer, script

HELP = """\
Hand a pipeline on to a trainer of another repository: what it will stop at or do otherwise, and what starts it.

  soar-mega handoff runs/x --to flow_grpo                     the export of a run
  soar-mega handoff runs/x --to unirl --ema                   its averaged weights
  soar-mega handoff models/mine --to verl_omni --out rl.sh    the lines into a file
  soar-mega handoff runs/x --to flow_grpo --run-in ~/flow_grpo --checkpoints 5 --save runs/rl
                                                              all of it: runs/rl/pipeline is what it made

The lines are for a shell in the trainer's own repository and environment. What it trains are adapters, which
`soar-mega convert PIPELINE OUT --lora` puts into the pipeline. With --run-in the lines are run there; the trainer never
ends by itself, so it is ended when it has saved --checkpoints checkpoints, and the newest adapters are put into the
pipeline. A link of a chain does the same (handoff: in soar_mega/launch/chain.py). Exit code 1: it would not start.
docs/handoff.md says what differs between the trainers.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "handoff",
        help="hand a pipeline on to an RL trainer of another repository",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN", help="run folder, or a pipeline folder")
    parser.add_argument("--to", required=True, choices=sorted(TRAINERS), help="the trainer")
    parser.add_argument("--ema", action="store_true", help="of a run: its export of averaged weights")
    parser.add_argument("--out", metavar="FILE", help="write the lines there instead of printing them")
    parser.add_argument(
        "--save",
        metavar="DIR",
        help="where the trainer is to write (default: beside the pipeline, named after it)",
    )
    parser.add_argument(
        "--run-in", metavar="REPOSITORY", help="run the lines in this checkout of its repository"
    )
    parser.add_argument(
        "--checkpoints", type=int, default=1, help="of --run-in: end it then (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    pipeline, trainer = _pipeline(Path(arguments.source), arguments.ema), TRAINERS[arguments.to]
    if arguments.run_in and not trainer.adapters:
        raise ValueError(
            f"--run-in: {trainer.name} leaves checkpoints of a form of its own: run its lines, which say how they "
            "become weights"
        )
    check_at_least_one(arguments, "checkpoints")

    from soar_mega.handoff import check

    found = check.check(pipeline, trainer)
    for finding in found:
        print(f"{'stops' if finding.stops else 'differs'}: {finding.words}")
    if any(finding.stops for finding in found):
        return 1
    save = Path(arguments.save) if arguments.save else pipeline.absolute().parent / trainer.name
    if arguments.run_in:
        return _run(trainer, pipeline, save, Path(arguments.run_in), arguments.checkpoints)
    lines = script(trainer, check.handoff(pipeline, save))
    if arguments.out is None:
        print(lines, end="")
        return 0

    from soar_mega.outputs import write_file

    write_file(arguments.out, lines.encode(), MARK.encode())
    print(f"wrote {arguments.out}")
    return 0


def _pipeline(source: Path, ema: bool) -> Path:
    """A pipeline folder, or the export of a run. ValueError where there is none."""
    if (source / "model_index.json").is_file() and not ema:
        return source
    export = source / ("export_ema" if ema else "export")
    if not (export / "model_index.json").is_file():
        raise ValueError(
            f"{source} is no pipeline folder, and {export} is none either: a run writes it at its end, and "
            "`soar-mega convert` makes one of a checkpoint"
        )
    return export


def _run(trainer: Trainer, pipeline: Path, save: Path, repository: Path, checkpoints: int) -> int:
    """Trains in a folder of its own for each attempt: these trainers begin anew."""
    from soar_mega.cli.process import start_process
    from soar_mega.handoff import check, outside

    start_process()
    if not repository.is_dir():
        raise ValueError(f"--run-in: {repository} is no folder: clone github.com/{trainer.repository} there")
    attempts = sorted(save.glob("attempt_*"))
    if not attempts or len(outside.saved(attempts[-1])) < checkpoints:
        attempts.append(save / f"attempt_{len(attempts) + 1:03d}")
        attempts[-1].mkdir(parents=True)
        lines = script(trainer, check.handoff(pipeline, attempts[-1]))
        outside.train_outside(f"set -e\n{lines}", repository, attempts[-1], checkpoints)
    outside.put_into_pipeline(pipeline, outside.saved(attempts[-1])[-1], save / "pipeline")
    print(f"wrote {save / 'pipeline'}, with the adapters of {trainer.name}")
    return 0
