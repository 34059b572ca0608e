"""soar-mega chain"""

import argparse
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soar_mega.launch.chain import Chain, Link

HELP = """\
Run stages that follow each other, each starting from what the one before made: sft, soar, evaluate, flow_grpo.

  soar-mega chain recipes/chains/tiny.yaml --dry-run        what would be run
  soar-mega chain recipes/chains/tiny.yaml --processes 2    here, link by link
  soar-mega chain recipes/chains/tiny.yaml --slurm          as jobs that wait for each other
  soar-mega chain recipes/chains/tiny.yaml --status         how far it is, and why it stopped

A link is done by its completion marker, in which the hashes of what it started from and of what it made are written; a
link that is done and verified is skipped when the chain is started again. A failed link stops those after it.
soar_mega/launch/chain.py describes the file.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "chain",
        help="run stages that follow each other",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chain", help="a YAML file, for example recipes/chains/tiny.yaml")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="run the links here (the default)")
    where.add_argument("--slurm", action="store_true", help="submit the links as jobs")
    where.add_argument("--status", action="store_true", help="say how far the chain is")
    # what the jobs of a chain call
    where.add_argument("--link", metavar="NAME", help=argparse.SUPPRESS)
    where.add_argument("--begin", nargs=argparse.REMAINDER, metavar="NAME ARGUMENTS", help=argparse.SUPPRESS)
    where.add_argument("--end", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument(
        "--processes", type=int, default=1, help="of a train link run here (default: %(default)s)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the commands or job scripts, and run nothing"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from soar_mega.cli.process import start_process
    from soar_mega.launch.chain import load_chain

    chain = load_chain(arguments.chain)
    _check_words(chain)
    start_process()

    from soar_mega.launch import links, run_chain, slurm

    if arguments.link:
        return run_chain.run_link(chain, chain.link(arguments.link))
    if arguments.begin:
        name, *submitted = arguments.begin
        link = chain.link(name)
        with links.failure_noted(link):
            links.check_submitted(link, submitted)
            links.begin(chain, link)
        return 0
    if arguments.end:
        link = chain.link(arguments.end)
        with links.failure_noted(link):
            links.end(link)
        return 0
    if arguments.status:
        for name, state in run_chain.status(chain, _queued):
            print(f"{name}: {state}")
        return 0
    if arguments.dry_run:
        todo = run_chain.to_do(chain)
        for link in chain.links:
            if link not in todo:
                print(f"# {link.name}: complete")
                continue
            if link.worker is not None and arguments.slurm:
                print(slurm.render(run_chain.worker_job(chain, link), link.worker.resources))
            elif link.worker is not None:
                print(f"# beside {link.name}\n{shlex.join(['soar-mega', *link.worker.arguments(False)])}")
            if arguments.slurm:
                print(slurm.render(run_chain.job(chain, link), link.resources))
            else:
                print(f"# {link.name}\n{shlex.join(run_chain.command(link, arguments.processes))}")
        return 0
    if arguments.slurm:
        submitted = run_chain.submit(chain)
        for link, number in submitted:
            print(f"{link.name}: job {number}, logs in {link.folder}/slurm")
        if not submitted:
            print("all links are complete")
        return 0
    run_chain.run_local(chain, arguments.processes)
    return 0


def _check_words(chain: "Chain") -> None:
    """ValueError where a link has a word that its verb does not know: its turn may come after days."""
    from soar_mega.cli import build_parser

    parser = build_parser()
    for link in chain.links:
        commands = [] if link.kind == "command" else [link.arguments]
        if link.worker is not None:
            commands.append(link.worker.arguments(on_network=False))
        for words in commands:
            try:
                parser.parse_args(words)
            except SystemExit:  # it has said why
                raise ValueError(
                    f"{chain.file}: {link.name}: it would run soar-mega {shlex.join(words)}"
                ) from None


def _queued(link: "Link") -> str | None:
    """The job of a link; none where there is no SLURM."""
    from soar_mega.launch import slurm

    try:
        return slurm.queued(link.folder / "slurm")
    except FileNotFoundError:
        return None
