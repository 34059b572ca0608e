"""A reward worker beside a link that trains: its address is in a file of the link's folder, and it ends with the link.

- name: flow_grpo
  train: recipes/sd35_medium/flow_grpo_ocr.yaml
  reward_worker: {serve: [ocr, --weights, models/scorers], slurm: {gpus_per_node: 1}}
"""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from soar_mega.checkpoints.background import die_with_parent
from soar_mega.launch.slurm import Resources
from soar_mega.rewards.url_file import FAILURE

logger = logging.getLogger(__name__)

FOLDER = "reward_worker"  # in the link's
ENDING = 60  # seconds for what it has begun
SHOWN_LINES = 5  # of its log


@dataclass(frozen=True, kw_only=True)
class RewardWorker:
    """What `soar-mega serve-reward` is started with."""

    folder: Path
    names: list[str]
    options: list[str]
    resources: Resources

    @staticmethod
    def of(words: Sequence[str], folder: Path, resources: Resources) -> "RewardWorker":
        """From the names and options of a chain file. ValueError: there is no name."""
        names = list(takewhile(lambda word: not word.startswith("-"), words))
        if not names:
            raise ValueError("reward_worker: serve: name the rewards first, then options of serve-reward")
        options = list(words[len(names) :])
        return RewardWorker(folder=folder, names=names, options=options, resources=resources)

    @property
    def url_file(self) -> Path:
        return self.folder / "url"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def asked(self, rewards: Mapping[str, float]) -> dict[str, float]:
        """The rewards of a recipe, those that are served asked of the worker.

        ValueError: one that is served is not among them.
        """
        if unknown := [name for name in self.names if name not in rewards]:
            raise ValueError(
                f"reward_worker serves {unknown[0]}, which stage.rewards does not name: it has {', '.join(rewards)}"
            )
        return {
            f"file:{self.url_file}#{_known_as(key)}" if key in self.names else key: weight
            for key, weight in rewards.items()
        }

    def arguments(self, on_network: bool) -> list[str]:
        """Of the soar-mega command: what the chain file says wins, but for where the address is written."""
        words = ["serve-reward", *self.names, "--port", "0"]
        if on_network:
            words += ["--host", "0.0.0.0", "--token-file", str(self.token_file)]
        return [*words, *self.options, "--url-file", str(self.url_file)]

    def make_ready(self) -> None:
        """Its folder, without what an earlier worker left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / FAILURE, self.url_file):
            path.unlink(missing_ok=True)

    def make_token(self) -> None:
        """The secret by which a worker on a network knows its run, in a file of this user alone."""
        opened = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(opened, "w") as file:
            file.write(secrets.token_hex(32) + "\n")


@contextlib.contextmanager
def running(worker: RewardWorker) -> Iterator["subprocess.Popen[bytes]"]:
    """The process of a worker, which answers, on this machine. When it ends too early its folder says why.

    What asks it then ends at once. ValueError: it does not come up.
    """
    worker.make_ready()
    log, ended = worker.folder / "worker.log", threading.Event()
    words = [sys.executable, "-m", "soar_mega", *worker.arguments(on_network=False)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent(os.getpid())
        )

    def watch() -> None:
        code = process.wait()
        if not ended.is_set():
            lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            why = "\n  ".join([f"it ended with exit code {code}, see {log}", *lines])
            (worker.folder / FAILURE).write_text(f"{why}\n")

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        while not worker.url_file.exists():
            if not watching.is_alive():
                raise ValueError(f"reward worker: {(worker.folder / FAILURE).read_text().strip()}")
            time.sleep(0.1)
        logger.info("reward worker: %s, log in %s", ", ".join(worker.names), log)
        yield process
    finally:
        ended.set()
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
        watching.join()


def _known_as(key: str) -> str:
    """What a worker calls a reward of a recipe: of module:function#NAME the name, of module:function the function."""
    source, _, entry = key.partition("#")
    return entry or source.rpartition(":")[2]
