"""soar-mega convert"""

import argparse

HELP = "soon"


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("convert")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return 0
