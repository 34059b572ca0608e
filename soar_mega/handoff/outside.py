"""A trainer of another repository as a process. It never ends by itself: it is ended when it has saved enough."""

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from soar_mega.convert import WeightFiles
from soar_mega.convert.adapter_files import PEFT_CONFIG, PEFT_FILE, open_lora
from soar_mega.convert.change_form import to_pipeline_folder
from soar_mega.convert.merging import with_adapters
from soar_mega.convert.weights import open_weights
from soar_mega.faults.signals import terminated_as_interrupted
from soar_mega.training_facts import facts_of_copy

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds
# what it is told, and how many seconds it then has: distributed launchers end their ranks at either of the first two
ENDINGS = ((signal.SIGINT, 60.0), (signal.SIGTERM, 30.0), (signal.SIGKILL, 30.0))


def train_outside(script: str, repository: Path, save: Path, checkpoints: int) -> None:
    """Run a trainer until it has saved so many checkpoints.

    Args:
        script: lines for bash, run in the folder of the trainer's repository.
        save: where these have it write; what lies there counts too.

    Raises:
        ValueError: it ended before; its own words are in this process's output.
    """
    with _running(script, repository) as process:
        while (found := len(saved(save))) < checkpoints:
            code = process.poll()
            if code is not None:
                raise ValueError(
                    f"the trainer ended with exit code {code} after {found} of {checkpoints} checkpoints in {save}"
                )
            time.sleep(LOOK_EVERY)
    logger.info("%d checkpoints are saved: the trainer was ended", checkpoints)


def saved(folder: Path) -> list[Path]:
    """The complete adapters of checkpoints below a folder, by number; those from before the first step are left out."""
    numbers = {}
    for path in folder.rglob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and int(number[1]) > 0 and (place := _complete(path)) is not None:
            numbers[int(number[1])] = place
    return [numbers[number] for number in sorted(numbers)]


def put_into_pipeline(pipeline: Path, adapters: Path, out: Path) -> None:
    """Write a pipeline folder with adapters in its weights, in float32 so that nothing of them is lost."""
    with open_weights(pipeline) as weights:
        facts = facts_of_copy(pipeline, "fp32", is_changed=True)
        exact = WeightFiles(dtype=torch.float32)
        to_pipeline_folder(with_adapters(weights, adapters), pipeline, out, exact, facts)


def _complete(checkpoint: Path) -> Path | None:
    """The folder of a checkpoint's adapters, None while they are being written."""
    for folder in (checkpoint, checkpoint / "lora"):
        if (folder / PEFT_FILE).is_file() and (folder / PEFT_CONFIG).is_file():
            try:
                open_lora(folder)
            except ValueError:
                continue  # it is shorter than its header says, or its configuration is half there
            return folder
    return None


@contextmanager
def _running(script: str, repository: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer, which is ended with the context, and so when this process is told to end."""
    with terminated_as_interrupted():
        process = subprocess.Popen(["bash", "-c", script], cwd=repository, start_new_session=True)
        try:
            yield process
        finally:
            for number, seconds in ENDINGS:
                _tell(process, number)
                try:
                    process.wait(seconds)
                    break
                except subprocess.TimeoutExpired:
                    logger.warning("the trainer did not end within %.0f seconds of %s", seconds, number.name)
            _tell(process, signal.SIGKILL)  # whatever of it is left


def _tell(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
