"""soar-mega fetch-weights"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from soar_mega.evaluation.scorers import SCORERS, SET_METRICS
from soar_mega.evaluation.scorers.scorer_files import WeightFile, differs

KNOWN = SCORERS | SET_METRICS

HELP = """\
List the files that the scorers of an evaluation read: what has to be copied to a cluster without a network.

  soar-mega fetch-weights --list                                    of all scorers
  soar-mega fetch-weights --list --suite paper                      of those that a suite asks
  soar-mega fetch-weights --list gen_eval clip_score                of these
  soar-mega fetch-weights --list --weights DIR                      and which of them are in DIR
  soar-mega fetch-weights --list --weights DIR --verify             reading each, for its SHA-256

Nothing is downloaded. A file of the public repository OWNER/NAME belongs at DIR/OWNER/NAME/file. With --weights, exits
with 1 when something is missing or not as published.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "fetch-weights",
        help="list the files that scorers need",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scorers", nargs="*", metavar="SCORER", help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--list", action="store_true", required=True, help="the only thing that it does")
    parser.add_argument("--suite", metavar="FILE|NAME", help="the scorers of a suite of `evaluate`")
    parser.add_argument("--weights", metavar="DIR", help="look into this folder")
    parser.add_argument("--verify", action="store_true", help="with --weights: compare SHA-256 too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    faults = 0
    names = asked(arguments.scorers, arguments.suite)
    for file, readers in read_by(names).items():
        size = f"{file.size:,} bytes" if file.size else "size unknown"
        print(f"{file.path}\n    {size}, SHA-256 {sha256_words(file)}, read by {', '.join(readers)}")
        if arguments.weights:
            fault = differs(file, Path(arguments.weights), arguments.verify)
            faults += bool(fault)
            print(f"    {fault or 'is there'}")
    for name in names:
        if not KNOWN[name].files:
            print(f"{name}: its models are inside the Python package {KNOWN[name].packages[0]}")
    return 1 if faults else 0


def asked(names: list[str], suite: str | None) -> list[str]:
    """What is asked for, all that there is where nothing is said."""
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"there is no scorer {unknown[0]!r}; there are {', '.join(KNOWN)}")
    if suite:
        from soar_mega.evaluation.suite.suite_settings import load_suite

        names = [*names, *(name for part in load_suite(suite).sets for name in part.scorers)]
    return [name for name in KNOWN if name in names or not (names or suite)]


def read_by(names: Iterable[str]) -> dict[WeightFile, list[str]]:
    """Each file once, and whose it is."""
    readers: dict[WeightFile, list[str]] = {}
    for name in names:
        for file in KNOWN[name].files:
            readers.setdefault(file, []).append(name)
    return readers


def sha256_words(file: WeightFile) -> str:
    """In full, or what of it is known."""
    if not file.sha256:
        return "unknown"
    return file.sha256 if len(file.sha256) == 64 else f"{file.sha256}... (no more of it is published)"
