"""Reward workers of links on their way: their folders, and a process of one on this machine."""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from soar_mega.checkpoints.background import die_with_parent
from soar_mega.launch.last_lines import with_last_lines
from soar_mega.launch.reward_worker import RewardWorker
from soar_mega.rewards.url_file import FAILURE

logger = logging.getLogger(__name__)

ENDING = 60  # seconds for what it has begun


def make_ready(worker: RewardWorker) -> None:
    """Its folder, without what an earlier worker left."""
    worker.folder.mkdir(parents=True, exist_ok=True)
    for path in (worker.folder / FAILURE, worker.url_file):
        path.unlink(missing_ok=True)


def make_token(worker: RewardWorker) -> None:
    """The secret by which a worker on a network knows its run, in a file of this user alone."""
    opened = os.open(worker.token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(opened, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


@contextlib.contextmanager
def running(worker: RewardWorker) -> Iterator["subprocess.Popen[bytes]"]:
    """The process of a worker, which answers, on this machine. When it ends too early its folder says why.

    What asks it then ends at once. ValueError: it does not come up.
    """
    make_ready(worker)
    log, ended = worker.folder / "worker.log", threading.Event()
    words = [sys.executable, "-m", "soar_mega", *worker.arguments(on_network=False)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent(os.getpid())
        )

    def watch() -> None:
        code = process.wait()
        if not ended.is_set():
            why = with_last_lines(f"it ended with exit code {code}, see {log}", log)
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
