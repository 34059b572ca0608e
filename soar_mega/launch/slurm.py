"""Jobs of SLURM: a template of recipes/slurm filled in, and handed to sbatch."""

import logging
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar_mega.outputs import write_file

logger = logging.getLogger(__name__)

MARK = b"# written by soar-mega"  # the last line of job scripts
JOB_ID = "job_id"  # the file with the number of a folder's job

TEMPLATES = Path(__file__).resolve().parents[2] / "recipes" / "slurm"
# of a rank beside its reader processes: its main thread, the one of the backward pass, NCCL's, what writes a checkpoint
OWN_CPUS = 4


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks SLURM for, and in which environment it runs."""

    nodes: int = 1
    processes_per_node: int = 8
    gpus_per_node: int | None = None  # None: one for each process; 0: a cluster without GPUs
    cpus_per_task: int | None = None  # None: what a rank keeps busy (`cpus_wanted`)
    time: str = "04:00:00"  # of one start; the job is requeued until it is complete
    signal_seconds: int = 300  # so long before the end of its time a job is asked to save
    retries: int = 0  # failures after which a job is requeued all the same
    partition: str = ""
    account: str = ""
    sbatch: list[str] = field(default_factory=list)  # further options, such as --constraint=h100
    template: str = "venv"  # venv | container | a file of your own
    image: str = ""  # of the container
    python: str = ""  # of the virtual environment; the one of this process when empty

    def __post_init__(self) -> None:
        cpus = 1 if self.cpus_per_task is None else self.cpus_per_task
        if min(self.nodes, self.processes_per_node, cpus) < 1:
            raise ValueError("nodes, processes per node and CPUs per task must be at least 1")
        if min(self.gpus_per_node or 0, self.retries) < 0:
            raise ValueError("GPUs per node and retries must be at least 0")
        seconds = time_seconds(self.time)
        if not 30 <= self.signal_seconds < seconds:
            raise ValueError(
                f"signal seconds {self.signal_seconds}: at least 30, and less than the time limit of {seconds} s"
            )
        if (self.template == "container") != bool(self.image) and self.template in ("venv", "container"):
            raise ValueError(
                "the container template and an image go together: --template container --image FILE"
            )

    @property
    def processes(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.processes_per_node


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job does, on which marker it is complete, and where it logs."""

    name: str
    arguments: list[str]  # of the soar-mega command that all ranks run
    marker: Path  # written last by the command; its folder holds the script and the logs, in slurm/
    num_workers: int = 0  # reader processes of a rank
    # further arguments and the marker, per array index
    sweep: list[tuple[list[str], Path]] = field(default_factory=list)
    # arguments of a soar-mega command that runs once on the first node
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)  # likewise, when the marker is there
    beside: Path | None = None  # the folder of a job with which this one ends, complete

    @property
    def folder(self) -> Path:
        """Where the rendered script and the logs go."""
        return self.marker.parent / "slurm"


def resources(settings: Mapping[str, Any], where: str) -> Resources:
    """Resources from `key: value` settings of a file; a ValueError names an unknown key or a wrong type."""
    kinds = typing.get_type_hints(Resources)
    for key, value in settings.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; the keys are {', '.join(kinds)}")
        kind = list if key == "sbatch" else int if key in ("gpus_per_node", "cpus_per_task") else kinds[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            advice = ' (write it in quotes: "04:00:00")' if key == "time" else ""
            raise ValueError(f"{where}: {key}: expected {kind.__name__}, found {value!r}{advice}")
    return Resources(**settings)


def cpus_wanted(num_workers: int) -> int:
    """The CPUs that a rank with a GPU and so many reader processes keeps busy."""
    return num_workers + OWN_CPUS


def time_seconds(text: str) -> int:
    """Seconds of a time limit as sbatch writes it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    days = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", text)
    if days:
        d, h, m, s = (int(part or 0) for part in days.groups())
        return ((d * 24 + h) * 60 + m) * 60 + s
    parts = text.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) > 3:
        raise ValueError(
            f"time limit {text!r}: write it like sbatch does, 04:00:00 or 2-12:00:00 (days-hours:minutes:seconds)"
        )
    numbers = [int(part) for part in parts]
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def render(job: Job, wanted: Resources) -> str:
    """The job script. ValueError when the template is missing or has a word that nothing fills in."""
    folder = Path.cwd() / job.folder
    gpus = wanted.processes_per_node if wanted.gpus_per_node is None else wanted.gpus_per_node
    cpus = wanted.cpus_per_task or cpus_wanted(job.num_workers)
    if gpus and cpus < cpus_wanted(job.num_workers):
        logger.warning(
            "%s: with %d CPUs per task the GPUs will wait: a rank keeps %d busy (%d, and data.num_workers=%d). "
            "Leave --cpus-per-task (cpus_per_task in a chain) out to ask for that many",
            *(job.name, cpus, cpus_wanted(job.num_workers), OWN_CPUS, job.num_workers),
        )
    options = {"gpus-per-node": gpus, "partition": wanted.partition, "account": wanted.account}
    more = [f"--{name}={value}" for name, value in options.items() if value] + wanted.sbatch
    if job.sweep:
        more.append(f"--array=0-{len(job.sweep) - 1}")
    values = {
        "JOB_NAME": re.sub(r"[^\w.-]+", "_", job.name),
        "NODES": wanted.nodes,
        "PROCESSES_PER_NODE": wanted.processes_per_node,
        "CPUS_PER_TASK": cpus,
        "TIME": wanted.time,
        "SIGNAL_SECONDS": wanted.signal_seconds,
        "RETRIES": wanted.retries,
        "LOG": _directive(f"{folder}/".replace("%", "%%") + ("%A_%a.log" if job.sweep else "%j.log")),
        "SBATCH_LINES": "\n".join(f"#SBATCH {line}" for line in more),
        "DIRECTORY": shlex.quote(str(Path.cwd())),
        "TEMPLATES": shlex.quote(str(TEMPLATES)),
        "PYTHON": shlex.quote(wanted.python or sys.executable),
        "IMAGE": shlex.quote(wanted.image),
        "ARGUMENTS": shlex.join(job.arguments),
        "MARKER": shlex.quote(str(job.marker)),
        "SWEEP": _sweep(job.sweep),
        "BESIDE": "" if job.beside is None else f"beside={shlex.quote(str(job.beside / JOB_ID))}",
        "BEFORE": _single(job.before),
        "AFTER": _single(job.after),
    }
    path = TEMPLATES / f"{wanted.template}.sbatch"
    if wanted.template not in ("venv", "container"):
        path = Path(wanted.template)
    if not path.is_file():
        raise ValueError(f"{path}: no such template; templates are venv, container, or a file of your own")

    def fill(word: re.Match[str]) -> str:
        if word[1] not in values:
            raise ValueError(f"{path}: nothing fills in {word[0]}; there are {', '.join(values)}")
        return str(values[word[1]])

    lines = [(line, re.sub(r"\{\{(\w+)\}\}", fill, line)) for line in path.read_text().splitlines()]
    return "\n".join(filled for line, filled in lines if filled or not line) + "\n"


def _directive(text: str) -> str:
    """A value of an #SBATCH line: for sbatch quotes keep a space in it, and a backslash before the space does not."""
    if re.fullmatch(r"[\w./%:=@,+-]*", text):
        return text
    return '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'


def _sweep(elements: Sequence[tuple[list[str], Path]]) -> str:
    """The choice of an array's element."""
    if not elements:
        return ""
    cases = [
        f"{i}) arguments+=({shlex.join(arguments)}) marker={shlex.quote(str(marker))} ;;"
        for i, (arguments, marker) in enumerate(elements)
    ]
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"])


def _single(arguments: Sequence[str]) -> str:
    """A soar-mega command on the first node, which ends the job when it fails."""
    return f'"${{python[@]}}" -m soar_mega {shlex.join(arguments)} || exit 1' if arguments else ""


def submit(job: Job, wanted: Resources, after: str | None = None, with_job: str | None = None) -> str:
    """Writes the job script and submits it; the number of the job.

    Args:
        after: a job that must succeed first; if it fails, this one is cancelled.
        with_job: one that must have started.

    Raises:
        ValueError: SLURM refuses, with its own words, or there is a job script that this program did not write.
        FileNotFoundError: there is no sbatch here.
    """
    script = job.folder / "job.sbatch"
    write_file(script, render(job, wanted).encode() + MARK + b"\n", MARK)
    waits = [f"{how}:{number}" for how, number in (("afterok", after), ("after", with_job)) if number]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    number = _call("sbatch", "--parsable", *dependency, str(script)).split(";")[0].strip()
    (job.folder / JOB_ID).write_text(number + "\n")
    return number


def queued(folder: Path) -> str | None:
    """The job that was last submitted from a `slurm` folder, as "12 (PENDING)", if it is still in the queue."""
    path = folder / JOB_ID
    if not path.exists():
        return None
    number = path.read_text().strip()
    for line in _call("squeue", "--noheader", "--format=%i %T").splitlines():
        listed, state = line.split()
        if listed.split("_")[0] == number:  # an array's elements are 12_0, 12_[1-3]
            return f"{number} ({state})"
    return None


def cancel(number: str) -> None:
    """Takes a job out of the queue."""
    _call("scancel", number)


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no {command[0]} here: run this on a login node of the cluster, or look at it with --dry-run"
        ) from None
    if done.returncode != 0:
        raise ValueError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
