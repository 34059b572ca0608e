"""Runs soar-mega commands as a user would, each in its own process, with a line of progress now and then."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRESS_SECONDS = 10.0
ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+)")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command with its output in a file. `threads` is per process."""

    name: str
    arguments: Sequence[str]
    log: Path
    threads: int


def soar_mega(*arguments: str) -> list[str]:
    """The command line in one process."""
    return [sys.executable, "-m", "soar_mega", *arguments]


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The command line on several processes of this machine."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    return [*launcher, "-m", "soar_mega", *arguments]


def run_together(*lanes: Sequence[Command]) -> None:
    """Runs lanes side by side until all are done; the commands of a lane one after another.

    Raises:
        RuntimeError: a command failed, with the end of its output; the others are stopped.
    """
    waiting = [list(lane) for lane in lanes]
    running: dict[int, tuple[Command, subprocess.Popen[bytes]]] = {}
    started = told = time.monotonic()
    try:
        while running or any(waiting):
            for lane, commands in enumerate(waiting):
                if lane in running and _has_ended(*running[lane]):
                    del running[lane]
                if lane not in running and commands:
                    command = commands.pop(0)
                    running[lane] = command, _start(command)
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                states = ", ".join(_state(command) for command, _ in running.values())
                print(f"    {told - started:4.0f} s: {states}", flush=True)
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            _stop(process)


def _has_ended(command: Command, process: subprocess.Popen[bytes]) -> bool:
    code = process.poll()
    if code is not None and code != 0:
        raise RuntimeError(f"{command.name} failed with exit code {code}:\n{_end_of(command)}")
    return code is not None


def _start(command: Command) -> subprocess.Popen[bytes]:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(command.threads), "PYTHONUNBUFFERED": "1"}
    with command.log.open("wb") as log:
        # A session of its own, so that stopping it takes torchrun's workers along.
        return subprocess.Popen(
            command.arguments, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _state(command: Command) -> str:
    steps = ITERATION.findall(command.log.read_text(errors="replace"))
    return (
        f"{command.name} at iteration {steps[-1][0]} of {steps[-1][1]}"
        if steps
        else f"{command.name} is running"
    )


def _end_of(command: Command, lines: int = 25) -> str:
    text = command.log.read_text(errors="replace").splitlines()
    return "\n".join([*text[-lines:], f"(all of it: {command.log})"])
