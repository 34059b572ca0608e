"""Checkpoints that survive a crash at any moment.

The protocol, in this order; each step leaves a folder to resume from:
1. all ranks write their shards into iter_0000100.tmp (megatron's dist_checkpointing: any layout can load them);
2. rank 0 adds checkpoint.json and makes every file durable;
3. the folder is renamed to iter_0000100: from here on it is complete;
4. latest_checkpointed_iteration.txt is replaced atomically: from here on it is the one to resume from;
5. only then are older checkpoints removed.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from soar_mega.config import CheckpointConfig
from soar_mega.distributed import is_rank_zero
from soar_mega.training.agreement import PeerFailure, on_rank_zero
from soar_mega.training.run_folder import DELETED, TEMPORARY, RunFolder, sync_folder, write_durably
from soar_mega.training.signals import held_back

logger = logging.getLogger(__name__)

DESCRIPTION = "checkpoint.json"
FORMAT = 1
# CheckpointException is a BaseException: torch wants a failed checkpoint to be noticed
_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
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
    loader: Json | None = None  # Loader.state_dict()


class Saved(Protocol):
    """The part of an engine that saving needs."""

    @property
    def weights(self) -> Mapping[str, Any]: ...  # kept weights by name, ema among them

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]: ...


class Stateful(Saved, Protocol):
    """The part of an engine that saving and loading need."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def weights_state_dict(self, name: str) -> dict[str, Any]: ...

    def load_weights(self, state: dict[str, Any]) -> None: ...


def save(run: RunFolder, engine: Saved, progress: Progress, model: Json, keep_last: int) -> None:
    """Writes the checkpoint of `progress.iteration` and makes it the one to resume from. Collective.

    Args:
        model: the sizes of the transformer; loading compares them.
        keep_last: newest checkpoints to keep, 0 keeps all.

    Raises:
        OSError: it could not be written, a full disk for instance; the previous checkpoint is as good as before.
    """
    final = run.checkpoint(progress.iteration)
    temporary = final.with_name(final.name + TEMPORARY)
    description = {
        "format": FORMAT,
        **dataclasses.asdict(progress),
        "model": model,
        "kept_weights": sorted(engine.weights),
    }
    try:
        on_rank_zero(lambda: _fresh(temporary))
        with held_back():
            dist_checkpointing.save(engine.sharded_state_dict(), str(temporary))
        on_rank_zero(lambda: _publish(run, temporary, final, description))
    except _FAILURES as error:
        if isinstance(error, PeerFailure) or (isinstance(error, CheckpointException) and not is_rank_zero()):
            raise PeerFailure(f"{final}: this checkpoint could not be written; rank 0 says why") from error
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(_save_advice(run, final, error)) from error
    on_rank_zero(lambda: run.prune(keep_last))
    logger.info("saved %s", final)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _publish(run: RunFolder, temporary: Path, final: Path, description: Json) -> None:
    """Steps 2 to 4 of the protocol."""
    assert run.latest() != description["iteration"], "the checkpoint to resume from is never replaced"
    write_durably(temporary / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    for file in temporary.iterdir():
        if file.suffix != ".distcp":  # dist_checkpointing has synced these itself
            sync_file(file)
    sync_folder(temporary)
    replaced = final.with_name(final.name + DELETED)
    if (
        final.exists()
    ):  # complete, but a crash kept the tracker from naming it, or it is of a run that was set back
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(run.path)
    run.set_latest(description["iteration"])
    shutil.rmtree(replaced, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Makes the content of a file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _save_advice(run: RunFolder, final: Path, error: BaseException) -> str:
    free = shutil.disk_usage(run.path).free / 2**20
    latest = run.latest()
    previous = "No earlier checkpoint exists."
    if latest is not None:
        previous = f"{run.checkpoint(latest)} is untouched: the run resumes from it."
    return (
        f"{final}: this checkpoint could not be written ({_reason(error)}). Most often the disk is full. What "
        f"there was of it is removed, which leaves {free:.0f} MiB free on that disk: make room or lower "
        f"checkpoint.keep_last, then start the run again. {previous}"
    )


def _reason(error: BaseException) -> str:
    """The heart of a message, in one line; torch tells of each rank with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:500] or type(error).__name__


def resume(run: RunFolder, config: CheckpointConfig, engine: Stateful, model: Json) -> Progress:
    """Loads what the recipe says to start from, and tells how far the run had come. Collective.

    The run's own checkpoint goes before `checkpoint.load`, so that a requeued job continues where it stopped.

    Raises:
        ValueError: the checkpoint is of another model, incomplete or unreadable.
    """
    latest = on_rank_zero(run.latest)
    if latest is not None:
        return _load(run.checkpoint(latest), engine, model)
    if not config.load:
        return Progress()
    folder = on_rank_zero(lambda: find_checkpoint(config.load))
    if not config.finetune:
        return _load(folder, engine, model)
    description = on_rank_zero(lambda: read_description(folder, model))
    name = "ema" if config.load_ema else "current"
    if config.load_ema and "ema" not in description["kept_weights"]:
        raise ValueError(f"checkpoint.load_ema: {folder} holds no EMA weights; set checkpoint.load_ema=false")
    with torch.no_grad():
        engine.load_weights(read_tensors(folder, engine.weights_state_dict(name)))
    logger.info("started from the %s weights of %s", name, folder)
    return Progress()


def _load(folder: Path, engine: Stateful, model: Json) -> Progress:
    description = on_rank_zero(lambda: read_description(folder, model))
    missing = sorted(set(engine.weights) - set(description["kept_weights"]))
    if missing:
        raise ValueError(
            f"{folder}: holds no {', '.join(missing)} weights, which this recipe keeps (train.ema_decay): resume it "
            "without, or start from its weights with checkpoint.load and checkpoint.finetune=true"
        )
    with torch.no_grad():
        engine.load_state_dict(read_tensors(folder, engine.sharded_state_dict(is_loading=True)))
    logger.info("resumed from %s", folder)
    names = [f.name for f in dataclasses.fields(Progress)]
    return Progress(**{name: description[name] for name in names})


def read_tensors(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What dist_checkpointing finds in a checkpoint for a sharded state dict; ValueError when it cannot be read."""
    try:
        return dist_checkpointing.load(state, str(folder))
    except _FAILURES as error:
        raise ValueError(
            f"{folder}: this checkpoint cannot be read ({_reason(error)}). To go on from an "
            f"earlier one, write its iteration number into {folder.parent}/latest_checkpointed_iteration.txt"
        ) from error


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: an iter_ folder itself, or the latest one of a run folder.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    if (folder / DESCRIPTION).exists():
        return folder
    latest = RunFolder(folder).latest() if folder.is_dir() else None
    if latest is None:
        raise ValueError(
            f"checkpoint.load: {folder} is neither a run folder with a checkpoint nor an iter_ folder"
        )
    return RunFolder(folder).checkpoint(latest)


def read_description(folder: Path, model: Json | None = None) -> Json:
    """checkpoint.json of a checkpoint, compared with the transformer's sizes where these are given.

    Raises:
        ValueError: not a complete checkpoint, an unknown format, or another model's; says in what they differ.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise ValueError(f"{path} is missing: {folder} is not a complete checkpoint of this program")
    description: Json = json.loads(path.read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {description.get('format')!r}, but this program reads format {FORMAT}"
        )
    saved = description["model"]
    if model is not None and saved != (wanted := json.loads(json.dumps(model))):
        differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        told = ", ".join(
            f"{key} is {saved.get(key)!r} there and {wanted.get(key)!r} here" for key in differing
        )
        raise ValueError(f"{folder}: checkpoint of another model: {told}")
    return description
