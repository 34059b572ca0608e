"""Checkpoints that survive a crash at any moment.

The protocol, in this order; each step leaves a folder to resume from:
1. all ranks write their files into iter_0000100.tmp (megatron's dist_checkpointing: any layout can load them), with
   checkpoint.async_save in processes of their own while training goes on;
2. when all have written, rank 0 adds checkpoint.json and, last of all, manifest.json, and makes every file durable;
3. the folder is renamed to iter_0000100: from here on it is complete;
4. latest_checkpointed_iteration.txt is replaced atomically: from here on it is the one to resume from;
5. only then are older checkpoints removed.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from soar_mega.checkpoints.background import Background, attempt
from soar_mega.checkpoints.manifest import Facts, write_manifest
from soar_mega.checkpoints.rank_file import RankFile, Written, plan_save
from soar_mega.checkpoints.run_folder import (
    DELETED,
    DESCRIPTION,
    TEMPORARY,
    RunFolder,
    write_durably,
)
from soar_mega.config import CheckpointConfig
from soar_mega.distributed import device, gather_on_rank_zero, is_rank_zero
from soar_mega.engines.saved_pieces import SavedPiece
from soar_mega.faults.agreement import PeerFailure, on_rank_zero
from soar_mega.outputs import sync

logger = logging.getLogger(__name__)

FORMAT = 1
# CheckpointException is a BaseException: torch wants a failed checkpoint to be noticed
FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    pickle.UnpicklingError,
    CheckpointingException,
    CheckpointException,
)

Json = dict[str, Any]


@dataclass(kw_only=True)
class Progress:
    """How far a run has come, apart from weights and optimizer."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0  # in the whole run
    loader: Json | None = None  # state_dict() of its loader or collector


class Saveable(Protocol):
    """The part of an engine that saving needs."""

    @property
    def weights(self) -> Mapping[str, Any]: ...  # kept weights by name, ema among them

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint that can be resumed from."""

    iteration: int
    blocked_seconds: float  # that training stood still for it
    seconds: float  # from its beginning until it was the one to resume from


@dataclass(kw_only=True)
class _Save:
    """A checkpoint that is being written."""

    final: Path
    temporary: Path
    description: Json
    file: RankFile
    writing: Background[Written] | None  # None: it has been written
    finalize: list[Callable[[], None]]  # dist_checkpointing's, when all ranks have written
    started: float
    blocked: float = 0.0


class Saver:
    """Writes the checkpoints of a run, one at a time. Every method but `close` is collective.

    Args:
        model: the sizes of the transformer; loading compares them.
        report: called with each checkpoint as soon as it can be resumed from.

    Raises:
        OSError: by any collective method: a checkpoint could not be written, because of a full disk for instance; the
            previous one is as good as before.
    """

    def __init__(
        self,
        run: RunFolder,
        config: CheckpointConfig,
        model: Json,
        report: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        self._run, self._config, self._model, self._report = run, config, model, report
        self._save: _Save | None = None

    def save(self, engine: Saveable, progress: Progress, pieces: Sequence[SavedPiece] = ()) -> None:
        """Writes the checkpoint of `progress.iteration` and makes it the one to resume from.

        With checkpoint.async_save it returns when the state is copied, and `poll` or `finish` does the rest. Waits for
        the checkpoint before.

        Args:
            pieces: this rank's part of what is kept beside the engine; nobody changes it while it is written.
        """
        self.finish()
        started = time.perf_counter()
        final = self._run.checkpoint(progress.iteration)
        temporary = final.with_name(final.name + TEMPORARY)
        description = {
            "format": FORMAT,
            **dataclasses.asdict(progress),
            "model": self._model,
            "kept_weights": sorted(engine.weights),
        }
        with self._explained(final, temporary):
            on_rank_zero(lambda: _fresh(temporary))
            state = engine.sharded_state_dict()
            if pieces:
                state["pieces"] = [*state.get("pieces", ()), *pieces]
            file, finalize = plan_save(state, temporary)
        writing = None
        if self._config.async_save:
            writing = Background(file.write)
        else:
            file.finish_write(attempt(file.write))
        self._save = _Save(
            final=final,
            temporary=temporary,
            description=description,
            file=file,
            writing=writing,
            finalize=finalize,
            started=started,
            blocked=time.perf_counter() - started,
        )
        if writing is None:
            self.finish()

    def poll(self) -> None:
        """Publishes the checkpoint that is being written if all ranks have written by now; never waits for it."""
        if self._save is not None and self._all_written(self._save):
            self._publish(self._save, time.perf_counter())

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if any, and publishes it."""
        if self._save is None:
            return
        since = time.perf_counter()
        while not self._all_written(self._save):
            time.sleep(0.01)
        self._publish(self._save, since)

    def rescue(self) -> None:
        """`finish` after a failure that all ranks share, which is on its way up: another one is told, not raised."""
        try:
            self.finish()
        except (OSError, PeerFailure) as error:
            if is_rank_zero():
                logger.error("%s", error)

    def close(self) -> None:
        """Ends what is being written. A process without peers waits for it.

        Where there are others, one of them may be gone, and a checkpoint is whole only when all have written: it is
        given up and named, and the next start removes what there is of it.
        """
        save = self._save
        if save is None or save.writing is None:
            return
        if dist.get_world_size() == 1:
            self.rescue()
            return
        self._save = None
        save.writing.kill()
        if is_rank_zero():
            logger.error("%s was still being written when the run ended: it is lost", save.final)

    def _all_written(self, save: _Save) -> bool:
        mine = save.writing is None or save.writing.done()
        votes = torch.tensor([int(mine)], dtype=torch.int32, device=device())
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes.item())

    def _publish(self, save: _Save, since: float) -> None:
        """Steps 2 to 5 of the protocol.

        Args:
            since: when training began to stand still for it.
        """
        self._save = None
        with self._explained(save.final, save.temporary):
            if save.writing is not None:
                save.file.finish_write(save.writing.outcome())
            for finalize in save.finalize:
                finalize()
            parts = gather_on_rank_zero(save.file.files)
            files = {name: facts for part in parts for name, facts in part.items()}
            on_rank_zero(lambda: _complete(self._run, save, files))
        keep = self._config
        taken = on_rank_zero(lambda: self._run.prune(keep.keep_last, keep.save_retain_interval))
        if is_rank_zero():
            _remove(taken, wait=not keep.async_save)
        now = time.perf_counter()
        saved = Saved(save.description["iteration"], save.blocked + now - since, now - save.started)
        logger.info(
            "saved %s (blocked %.2f s, written in %.1f s)", save.final, saved.blocked_seconds, saved.seconds
        )
        self._report(saved)

    @contextlib.contextmanager
    def _explained(self, final: Path, temporary: Path) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            if isinstance(error, PeerFailure) or (
                isinstance(error, CheckpointException) and not is_rank_zero()
            ):
                raise PeerFailure(
                    f"{final}: this checkpoint could not be written; rank 0 says why"
                ) from error
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(_save_advice(self._run, final, error)) from error


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _complete(run: RunFolder, save: _Save, files: dict[str, Facts]) -> None:
    """Steps 2 to 4 of the protocol.

    Args:
        files: what the ranks have written, which they have made durable themselves.
    """
    temporary, final, iteration = save.temporary, save.final, save.description["iteration"]
    assert run.candidates()[:1] != [iteration], "the checkpoint to resume from is never replaced"
    write_durably(temporary / DESCRIPTION, json.dumps(save.description, indent=1) + "\n")
    for file in temporary.iterdir():
        if file.name not in files:
            sync(file)
    write_manifest(temporary, files)
    replaced = final.with_name(final.name + DELETED)
    if final.exists() and not (final / DESCRIPTION).is_file():
        run.set_aside(iteration)  # not one of ours
    if final.exists():
        # complete, but a crash kept the tracker from naming it, or it is of a run that was set back
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync(run.path)
    run.set_latest(iteration)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(folders: list[Path], wait: bool) -> None:
    """Large files take their time to go; what is left of them when the process ends is removed at the next start."""

    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    remover = threading.Thread(target=remove)
    remover.start()
    if wait:
        remover.join()


def _save_advice(run: RunFolder, final: Path, error: BaseException) -> str:
    latest = run.latest()
    previous = "No earlier checkpoint exists."
    if latest is not None:
        previous = f"{run.checkpoint(latest)} is untouched: the run resumes from it."
    said = f"{final}: this checkpoint could not be written ({reason(error)}). "
    if not isinstance(_inner(error), OSError):
        return f"{said}What there was of it is removed. {previous}"
    free = shutil.disk_usage(run.path).free / 2**20
    return (
        f"{said}Most often the disk is full. What there was of it is removed, which leaves {free:.0f} MiB free on that "
        f"disk: make room or lower checkpoint.keep_last, then start the run again. {previous}"
    )


def reason(error: BaseException) -> str:
    """The heart of a message, in one line; torch tells of each rank with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {reason(failure)}"
    if isinstance(error, KeyError):
        return f"KeyError: {error}"  # which says no more than the key
    return " ".join(str(error).split())[:500] or type(error).__name__


def _inner(error: BaseException) -> BaseException:
    """What happened on the first rank that failed, where torch tells of each."""
    if isinstance(error, CheckpointException) and error.failures:
        failure, _ = next(iter(error.failures.values()))
        return _inner(failure)
    return error
