"""The soar-mega command: one module per verb, each with its parser and a thin `run` over the library."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence

from soar_mega import __version__
from soar_mega.cli import (
    chain,
    convert,
    data,
    doctor,
    evaluate,
    fetch_weights,
    handoff,
    launch,
    prepare,
    sample,
    serve_reward,
    train,
)

DESCRIPTION = """\
SOAR post-training of rectified-flow transformers (Stable Diffusion 3.5, FLUX.1) on megatron-core.

The usual road:
  soar-mega doctor                                     what this machine can do
  soar-mega prepare images/ shards/ --pipeline-dir P   encode images and captions once
  soar-mega data inspect shards/                       what they hold
  soar-mega train recipes/sd35_medium/soar.yaml ...    post-train; exports a diffusers pipeline
  soar-mega sample runs/x/export --prompt "a fox"      look at it
  soar-mega evaluate P runs/x/export --suite paper ... measure before and after
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; importing nothing heavy, so that --help answers at once."""
    parser = argparse.ArgumentParser(
        prog="soar-mega", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"soar_mega {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="verb")
    modules = (
        prepare,
        data,
        train,
        sample,
        evaluate,
        convert,
        handoff,
        launch,
        chain,
        serve_reward,
        fetch_weights,
        doctor,
    )
    for module in modules:
        module.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code: 0 done, 1 an error that the message explains, 2 wrong usage, 75 a run that
    was saved before it was finished."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except (ValueError, OSError) as error:
        _explain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _explain(error: Exception) -> None:
    """What the user did wrong, in one message; a defect of the program is no ValueError and shows its traceback."""
    if os.environ.get("SOAR_MEGA_TRACEBACK") == "1":
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if rank not in (None, "0"):
        # Most errors are the same everywhere. Rank 0 speaks first, and the launcher then ends the others; who is still
        # there afterwards has something of its own to say.
        time.sleep(3)
    prefix = "soar-mega" if rank is None else f"soar-mega [rank {rank}]"
    print(f"{prefix}: error: {error}", file=sys.stderr, flush=True)
