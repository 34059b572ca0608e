"""One rank of a tiny run that may be the one to fail in step 3: the first two may take three times as long.

As a program, under torchrun: guilty_rank.py RECIPE RANK ACT PHASE.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable

from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.data.loader import Loader
from soar_mega.stages.soar import Soar
from soar_mega.training import run_exports
from soar_mega.training.measurements import Measurements
from soar_mega.training.run import Trainer


def refuse() -> None:
    raise ValueError(f"rank {os.environ['RANK']} has had enough")


def spin() -> None:
    while True:
        time.sleep(0.01)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_readers() -> None:
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)


PHASES = {
    "data": (Loader, "__next__"),
    "learn": (Soar, "loss"),
    "measurements": (Measurements, "take"),
    "checkpoint": (Saver, "poll"),
    "export": (run_exports, "_export"),
}
SHORT_MINUTES = 0.03  # of a phase that is not a step, from where a rank acts in it


def act_in_step_3(act: Callable[[], None], phase: str) -> None:
    """Has this process act in a phase of its run: in step 3, or after step 2."""
    trainers: list[Trainer] = []
    step = Trainer.step

    def known_step(self: Trainer) -> float:
        trainers[:] = [self]
        return step(self)

    Trainer.step = known_step  # type: ignore[method-assign]
    owner, name = PHASES[phase]
    whole = getattr(owner, name)

    def with_act(self: object, *args: object) -> object:
        if trainers and trainers[0].progress.iteration == 2:
            trainers[0].recipe.train.phase_timeout_minutes = SHORT_MINUTES
            act()
        return whole(self, *args)

    setattr(owner, name, with_act)


if __name__ == "__main__":
    recipe, guilty, act, phase = sys.argv[1:]
    if os.environ["RANK"] == guilty:
        act_in_step_3({"refuse": refuse, "spin": spin, "stop": stop, "die": die}[act], phase)
    from soar_mega.cli import main

    sys.exit(main(["train", recipe]))
