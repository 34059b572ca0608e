"""Runs a chain on this machine, link by link, or submits it to SLURM as jobs that wait for each other."""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from soar_mega.checkpoints.run_folder import MARKER, TRACKER
from soar_mega.faults.signals import terminated_as_interrupted
from soar_mega.launch import run_worker, slurm
from soar_mega.launch.chain import Chain, Link
from soar_mega.launch.job_checks import check_data, check_fit
from soar_mega.launch.last_lines import with_last_lines
from soar_mega.launch.links import COMPLETED, FAILURE, begin, end, failure, failure_noted, why_not_done

logger = logging.getLogger(__name__)

UNFINISHED = 75


def run_local(chain: Chain, processes: int) -> None:
    """Runs what is not done, in order; stops at the first link that fails.

    Args:
        processes: ranks of a link that trains or evaluates a suite.

    Raises:
        ValueError: a link could not run, which is found before the first one does, or it failed; the message then
            holds the end of its log.
    """
    for link in chain.links:
        if not (link.folder / COMPLETED).exists():
            _check(link, processes)
    for number, link in enumerate(chain.links):
        try:
            if run_link(chain, link, processes) == UNFINISHED:
                raise ValueError(f"link {link.name} was interrupted: run the chain again")
        except (ValueError, OSError) as error:
            rest = ", ".join(each.name for each in chain.links[number + 1 :])
            raise ValueError(f"{error}" + (f"\nnot started because of it: {rest}" if rest else "")) from error


def _check(link: Link, processes: int) -> None:
    """ValueError where a train link would refuse to start, as far as that is known before its turn comes."""
    if link.recipe is None:
        return
    check_fit(link.recipe, processes)
    made_here = link.folder.parent in Path(link.recipe.data.path).parents  # by a link before it
    if not made_here:
        check_data(link.recipe)


def run_link(chain: Chain, link: Link, processes: int = 1) -> int:
    """Runs one link here, unless it is done. Returns 0 when it is done, 75 when it saved and wants to be started again.

    Raises:
        ValueError: it failed; the reason is in its failure.txt too.
    """
    with failure_noted(link):
        if not begin(chain, link):
            logger.info("link %s: done and verified", link.name)
            return 0
        logger.info("link %s: begins", link.name)
        with contextlib.ExitStack() as stack:
            if link.worker is not None:
                stack.enter_context(run_worker.running(link.worker))
            code = _run_to_its_end(link, processes)
        if code == UNFINISHED:
            return code
        if code != 0:
            words = f"link {link.name} failed with exit code {code}:"
            raise ValueError(with_last_lines(words, link.folder / "link.log"))
        end(link)
        logger.info("link %s: complete", link.name)
        return 0


def command(link: Link, processes: int) -> list[str]:
    """The command line of a link on this machine."""
    if link.kind == "command":
        return link.arguments
    program = ["-m", "soar_mega", *link.arguments]
    if link.is_parallel and processes > 1:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *program,
        ]
    return [sys.executable, *program]


def _run_to_its_end(link: Link, processes: int) -> int:
    """Runs a link's command, and one that saves and leaves again as long as it gets on; the last exit code."""
    code = _run_command(link, processes)
    while link.kind == "train" and code == UNFINISHED:
        before = _latest(link)
        code = _run_command(link, processes)
        if code == UNFINISHED and _latest(link) == before:
            break
    return code


def _run_command(link: Link, processes: int) -> int:
    """Runs a link's command, showing its output and keeping it in link.log; the exit code."""
    words = command(link, processes)
    with open(link.folder / "link.log", "a") as log:
        try:
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
        except OSError as error:
            raise ValueError(f"link {link.name}: {words[0]} cannot be run: {error}") from error
        assert process.stdout is not None
        with process, _told_to_end(process):
            for line in process.stdout:
                log.write(line)
                log.flush()
                logger.info("%s", line.rstrip("\n"))
    return process.returncode


@contextlib.contextmanager
def _told_to_end(process: "subprocess.Popen[str]") -> Iterator[None]:
    """When this process is told to end, so is the one that it runs, which may save first."""
    with terminated_as_interrupted():
        try:
            yield
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def _latest(link: Link) -> str:
    tracker = link.folder / TRACKER
    return tracker.read_text() if tracker.exists() else ""


def to_do(chain: Chain) -> list[Link]:
    """The links to submit: from the first one that is not done, all. What needs nothing says so when its turn comes."""
    for number, link in enumerate(chain.links):
        if why_not_done(chain, link) is not None:
            return chain.links[number:]
    return []


def job(chain: Chain, link: Link) -> slurm.Job:
    """The job of a link: all ranks of a parallel one run its command; of another one, a process runs the link."""
    name = f"{chain.file.stem}.{link.name}"
    here = ["chain", str(chain.file)]
    if link.is_parallel:
        return slurm.Job(
            name=name,
            arguments=link.arguments,
            marker=link.folder / MARKER if link.kind == "train" else link.product,
            num_workers=link.recipe.data.num_workers if link.recipe else 0,
            before=[*here, "--begin", link.name, *link.arguments],
            after=[*here, "--end", link.name],
        )
    return slurm.Job(name=name, arguments=[*here, "--link", link.name], marker=link.folder / COMPLETED)


def worker_job(chain: Chain, link: Link) -> slurm.Job:
    """The job of the reward worker of a link: it ends with the job of the link."""
    assert link.worker is not None
    return slurm.Job(
        name=f"{chain.file.stem}.{link.name}.reward",
        arguments=link.worker.arguments(on_network=True),
        marker=link.worker.folder / "ended",
        beside=link.folder / "slurm",
    )


def submit(chain: Chain) -> list[tuple[Link, str]]:
    """Submits what is not done, each link waiting for the one that it comes after. Returns links and job numbers.

    The worker of a link is a job of its own, which starts before the link does.

    Raises:
        ValueError: a link is in the queue already, or could not run, or SLURM refuses one; then none stays submitted.
    """
    links = to_do(chain)
    for link in links:
        _check(link, link.resources.processes)
        running = slurm.queued(link.folder / "slurm")
        if running is not None:
            raise ValueError(f"link {link.name} is job {running}: wait for it, or end it with scancel")
        worker = None if link.worker is None else slurm.queued(link.worker.folder / "slurm")
        if worker is not None:
            raise ValueError(
                f"the last reward worker of {link.name} is job {worker}: it ends in half a minute"
            )
    submitted: list[tuple[Link, str]] = []
    workers: list[str] = []
    try:
        for link in links:
            (link.folder / FAILURE).unlink(missing_ok=True)
            before = next((number for other, number in submitted if other.name == link.after), None)
            if link.worker is not None:
                workers.append(_submit_worker(chain, link, before))
            beside = workers[-1] if link.worker is not None else None
            submitted.append((link, slurm.submit(job(chain, link), link.resources, before, beside)))
    except (ValueError, OSError):
        for number in [*workers, *(number for _, number in reversed(submitted))]:
            slurm.cancel(number)
        raise
    return submitted


def _submit_worker(chain: Chain, link: Link, before: str | None) -> str:
    """Submits the job of a link's reward worker, after the job `before`; its number."""
    worker = link.worker
    assert worker is not None
    run_worker.make_ready(worker)
    run_worker.make_token(worker)
    # until the link has its number the worker waits for it
    (link.folder / "slurm" / slurm.JOB_ID).unlink(missing_ok=True)
    number = slurm.submit(worker_job(chain, link), worker.resources, before)
    logger.info("reward worker of %s: job %s, logs in %s/slurm", link.name, number, worker.folder)
    return number


def status(chain: Chain, queued: Callable[[Link], str | None]) -> list[tuple[str, str]]:
    """(link, state) of all links; `queued` tells the job of a link that is in the queue."""
    rows = []
    stopped: dict[str, str] = {}  # by link, the failed one that keeps it from beginning
    for link in chain.links:
        try:
            why = why_not_done(chain, link)
        except ValueError as error:
            why = str(error)
        running, failed = queued(link), failure(link)
        waits_for = stopped.get(link.after or "")
        if why is None:
            state = "complete"
        elif running:
            state = f"job {running}"
        elif failed:
            state, stopped[link.name] = f"failed: {failed}", waits_for or link.name
        elif waits_for:
            state, stopped[link.name] = f"not started, because {waits_for} failed", waits_for
        else:
            state = why
        rows.append((link.name, state))
    return rows
