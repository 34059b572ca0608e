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


def run_together(commands: Sequence[Command]) -> None:
    """Runs commands side by side until all are done.

    Raises:
        RuntimeError: one failed, with the end of its output; the others are stopped.
    """
    running = {command.name: (command, _start(command)) for command in commands}
    started = told = time.monotonic()
    try:
        while running:
            time.sleep(0.2)
            for name, (command, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code != 0:
                    raise RuntimeError(f"{name} failed with exit code {code}:\n{_end_of(command)}")
            if running and time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                states = ", ".join(_state(command) for command, _ in running.values())
                print(f"    {told - started:4.0f} s: {states}", flush=True)
    finally:
        for _, process in running.values():
            _stop(process)


def _start(command: Command) -> subprocess.Popen[bytes]:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(command.threads), "PYTHONUNBUFFERED": "1"}
    with command.log.open("wb") as log:
        # A session of its own, so that stopping it takes torchrun's workers along.
        return subprocess.Popen(
            command.arguments, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
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
