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
    """A command with its output in a file.

    Attributes:
        threads: per process.
        receipt: a file that is written when it has succeeded, and the text for it.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    threads: int
    receipt: tuple[Path, str] | None = None

    def has_receipt(self) -> bool:
        """Whether it has succeeded before, as it is now."""
        if self.receipt is None:
            return False
        path, text = self.receipt
        return path.is_file() and path.read_text() == text


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


def logged(folder: Path, name: str, arguments: Sequence[str], threads: int = 1) -> Command:
    """A command with its output in <folder>/logs/<name>.log."""
    return Command(name=name, arguments=arguments, log=folder / "logs" / f"{name}.log", threads=threads)


def end_on_sigterm() -> None:
    """Makes SIGTERM end this process as an exception does, so that `run_together` takes its commands along."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run_together(*chains: Sequence[Command], at_once: int | None = None) -> None:
    """Runs chains of commands side by side until all are done; the commands of a chain one after another.

    Args:
        at_once: how many chains run at a time, each on one of the machine's GPUs; None runs all of them, and each sees
            all GPUs.

    Raises:
        RuntimeError: a command failed, with the end of its output; the others are stopped.
    """
    waiting = [list(chain) for chain in chains if chain]
    gpus = [""] * len(chains) if at_once is None else places_on_gpus(at_once)
    running: list[Running] = []
    started = told = time.monotonic()
    try:
        while running or waiting:
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                if one.rest:
                    running.append(Running(one.rest, one.gpu))
                else:
                    gpus.append(one.gpu)
            while waiting and gpus:
                running.append(Running(waiting.pop(0), gpus.pop(0)))
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                queue = f"; {len(waiting)} more to come" if waiting else ""
                print(
                    f"    {told - started:4.0f} s: {', '.join(one.state() for one in running)}{queue}",
                    flush=True,
                )
            time.sleep(0.2)
    finally:
        for one in running:
            one.stop()


def places_on_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of so many processes; "" for all, where there are less than two."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    return [gpus[i % len(gpus)] if len(gpus) > 1 else "" for i in range(count)]


class Running:
    """The first command of a chain, started, and the rest of the chain.

    Args:
        gpu: the only one that it sees; "" for all.
    """

    def __init__(self, chain: list[Command], gpu: str) -> None:
        self.command, self.rest, self.gpu = chain[0], chain[1:], gpu
        self.command.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.command.threads), "PYTHONUNBUFFERED": "1"}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with self.command.log.open("wb") as log:
            # A session of its own, so that stopping it takes torchrun's workers along.
            self._process = subprocess.Popen(
                self.command.arguments,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """RuntimeError where it has failed."""
        code = self._process.poll()
        if code is not None and code != 0:
            raise RuntimeError(f"{self.command.name} failed with exit code {code}:\n{self._end_of_output()}")
        if code == 0 and self.command.receipt is not None:
            path, text = self.command.receipt
            path.write_text(text)
        return code is not None

    def state(self) -> str:
        name = self.command.name
        steps = ITERATION.findall(self.command.log.read_text(errors="replace"))
        return f"{name} at iteration {steps[-1][0]} of {steps[-1][1]}" if steps else f"{name} is running"

    def stop(self) -> None:
        if self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end_of_output(self, lines: int = 25) -> str:
        text = self.command.log.read_text(errors="replace").splitlines()
        return "\n".join([*text[-lines:], f"(all of it: {self.command.log})"])
