"""Kill -9 of a rank, of all ranks, or of the process that writes, at seeded random moments of a run on real processes.

What a run guarantees: every start goes on from a whole checkpoint; what is lost are the steps since the newest one that
was published, at most 2 save_interval of them, because a save waits for the one before it; and the run ends as if
nothing had been.
"""

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from multirank import run_ranks
from tiny_runs import logged, tiny_recipe

from soar_mega import platform
from soar_mega.checkpoints import checkpoint, manifest, rank_file
from soar_mega.checkpoints.background import Background
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.training.run import Trainer

ITERATIONS, INTERVAL, RANKS = 8, 2, 2
ACTS = 60  # of rank 0 in a run: somewhat more
TENSORS = 60  # that a rank writes at a time: somewhat more
_CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_ranks(tiny_runs.run, RANKS, recipe(shards, folder)) == [0] * RANKS
    return folder


def recipe(shards: Path, folder: Path) -> Recipe:
    return tiny_recipe(
        shards,
        folder,
        train__train_iters=ITERATIONS,
        checkpoint__save_interval=INTERVAL,
        parallel__tensor_model_parallel_size=RANKS,  # so that each writes
    )


class Doom:
    """Kills what the seed says, at the moment that it says.

    Moments are counted in acts of rank 0 (steps, and what it does to files), or in tensors of one of the first writers.
    """

    def __init__(self, folder: Path, seed: int, rank: int) -> None:
        draws = random.Random(seed)
        self.victim = draws.choice(["rank 0", "rank 1", "all ranks", "a writer"])
        self.in_writer = self.victim == "a writer" or draws.random() < 0.3
        self.moment = draws.randrange(TENSORS) if self.in_writer else draws.randrange(ACTS)
        self.writer = draws.randrange(3)
        self.is_killer = rank == (draws.randrange(RANKS) if self.in_writer else 0)
        self.folder, self.pid, self.seen, self.writers = folder, os.getpid(), 0, 0
        (folder / f"{rank}.pid").write_text(str(self.pid))

    def act(self) -> None:
        """Something is about to happen, in this rank or in its writer."""
        if not self.is_killer or self.in_writer == (os.getpid() == self.pid):
            return
        self.seen += 1
        if self.in_writer and self.writers != self.writer + 1 or self.seen <= self.moment:
            return
        if self.victim == "a writer":
            os.kill(os.getpid(), signal.SIGKILL)
        ranks = [0, 1] if self.victim == "all ranks" else [int(self.victim[-1])]
        pids = [int((self.folder / f"{rank}.pid").read_text()) for rank in ranks]
        for pid in sorted(pids, key=lambda pid: pid == self.pid):
            os.kill(pid, signal.SIGKILL)
        self.is_killer = False  # rank 1 was killed by rank 0, which goes on and notices

    def start_writer(self, write: Callable[[], Any]) -> Any:
        self.writers += 1

        def told() -> Any:
            (self.folder / f"{os.getpid()}.writer").touch()
            return write()

        return Background(told)

    def before(self, owner: Any, name: str) -> None:
        """Has each call of a function be an act."""
        function: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.act()
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)


def doomed_rank(recipe: Recipe, seed: int, rank: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(folder / "port").read_text(),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    platform.install()
    logging.basicConfig(filename=folder / f"log-{rank}", level=logging.WARNING)
    doom = Doom(folder, seed, rank)
    checkpoint.Background = doom.start_writer  # type: ignore[misc, assignment]
    doom.before(Trainer, "step")
    for owner, name in (
        (os, "rename"), (os, "replace"), (os, "fsync"), (checkpoint, "write_manifest"), (manifest, "write_durably"),
        (checkpoint, "sync"), (rank_file, "write_item"), (Trainer, "note"),
    ):  # fmt: skip
        doom.before(owner, name)
    tiny_runs.run(recipe)


def run_until_killed(recipe: Recipe, seed: int, folder: Path) -> list[int | None]:
    """All ranks of a start, until the last of them has ended; their exit codes."""
    import torch.distributed as dist

    folder.mkdir()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (folder / "port").write_text(str(store.port))
    ranks: list[BaseProcess] = [
        _CONTEXT.Process(target=doomed_rank, args=(recipe, seed, rank, folder)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(100)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return codes


def alive(pid: int) -> bool:
    try:
        return "Z" not in re.search(r"^State:\s+(\w)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]  # type: ignore[index]
    except FileNotFoundError:
        return False


def hashes(folder: Path) -> dict[str, str]:
    """Of the files with tensors."""
    files = json.loads((folder / manifest.MANIFEST).read_text())["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".distcp")}


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(35)])
def test_a_killed_run_ends_as_if_nothing_had_been(
    shards: Path, reference: Path, tmp_path: Path, seed: int
) -> None:
    run = RunFolder(tmp_path / "run")
    codes = run_until_killed(recipe(shards, run.path), seed, tmp_path / "start")
    assert None not in codes, "a rank waits for a dead one"
    assert all(codes), "nothing was killed"
    writers = [int(file.stem) for file in (tmp_path / "start").glob("*.writer")]
    patience = time.monotonic() + 10
    while any(map(alive, writers)):
        assert time.monotonic() < patience, "a writer outlives its rank"
        time.sleep(0.01)
    reached = max(logged(run.path), default=0)
    candidates = run.candidates() if run.path.exists() else []
    kept = candidates[0] if candidates else 0
    assert reached - kept <= 2 * INTERVAL
    for iteration in candidates:
        assert manifest.problems(run.checkpoint(iteration)) == []
    assert run_ranks(tiny_runs.run, RANKS, recipe(shards, run.path)) == [0] * RANKS
    log = (run.path / "train.log").read_text()
    resumed = re.findall(r"resumed from .*iter_(\d+)", log)
    assert [int(iteration) for iteration in resumed] == ([kept] if kept and run.path.exists() else [])
    assert logged(run.path) == logged(reference)
    assert hashes(run.checkpoint(ITERATIONS)) == hashes(RunFolder(reference).checkpoint(ITERATIONS))
