"""soar-mega convert"""

import argparse
from pathlib import Path

HELP = """\
Turn a checkpoint into a diffusers folder, or a diffusers folder into a checkpoint.

  soar-mega convert runs/x out/                       the latest checkpoint of a run, as a pipeline
  soar-mega convert runs/x/iter_0000500 out/ --ema    the EMA weights of a certain one
  soar-mega convert runs/x out/ --pipeline-dir P          encoders and scheduler copied from P
  soar-mega convert P runs/start                      a checkpoint of the pipeline's transformer, for
                                                      checkpoint.load=runs/start checkpoint.finetune=true

A checkpoint can be converted whatever layout it was trained at; a run that is complete has its pipeline in export/
already. The parts beside the transformer are copied from the pipeline that the run started from. An older output is
replaced when it holds nothing but what this program wrote.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "convert",
        help="checkpoints to diffusers folders and back",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", help="run folder, iter_ folder, or diffusers pipeline or transformer folder"
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--ema", action="store_true", help="the EMA weights of a checkpoint")
    parser.add_argument("--pipeline-dir", help="copy encoders and scheduler from this pipeline folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    source = Path(arguments.source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    from_diffusers = (source / "model_index.json").is_file() or (source / "config.json").is_file()
    if from_diffusers and (arguments.ema or arguments.pipeline_dir):
        raise ValueError(f"{source} is a diffusers folder: --ema and --pipeline-dir go with a checkpoint")

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.checkpoints.exchange import checkpoint_to_diffusers, diffusers_to_checkpoint

    if from_diffusers:
        print(f"wrote {diffusers_to_checkpoint(source, arguments.out)}")
        return 0
    whole = checkpoint_to_diffusers(source, arguments.out, arguments.pipeline_dir, arguments.ema)
    print(f"wrote {arguments.out}, a diffusers {'pipeline' if whole else 'transformer'} folder")
    return 0
