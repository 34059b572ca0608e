"""What a run starts from: its own newest good checkpoint, another run's, or nothing.

Every byte of a checkpoint is compared with its manifest before any of it is used. When the run's own newest one is
damaged, the run goes on from the one before; the damaged one is kept aside, as iter_0000100.broken.
"""

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from types import UnionType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from soar_mega.checkpoints.checkpoint import FORMAT, Json, Progress, Saveable
from soar_mega.checkpoints.manifest import problems
from soar_mega.checkpoints.reading import read_tensors
from soar_mega.checkpoints.run_folder import DESCRIPTION, RunFolder
from soar_mega.checkpoints.strict import held_names, listed
from soar_mega.config import CheckpointConfig
from soar_mega.engines.kept_weights import sharded_main_copies
from soar_mega.engines.on_demand import OnDemand, in_float32
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.user_files import read_object, whole

logger = logging.getLogger(__name__)

COLLECTED = "collected"  # among what is loaded for the engine


class Stateful(Saveable, Protocol):
    """The part of an engine that saving and loading need."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def weights_state_dict(self, name: str) -> dict[str, Any]: ...

    def load_weights(self, state: dict[str, Any]) -> None: ...


class Collecting(Protocol):
    """What a run learns from, where a checkpoint keeps tensors of it."""

    def wanted(self, state: Json) -> dict[str, Any]: ...

    def load_state_dict(self, state: Json, tensors: dict[str, Any]) -> None: ...


def resume(
    run: RunFolder,
    config: CheckpointConfig,
    engine: Stateful,
    model: Json,
    collector: Collecting | None = None,
) -> Progress:
    """Loads what the recipe says to start from, and tells how far the run had come. Collective.

    The run's own checkpoint goes before `checkpoint.load`, so that a requeued job continues where it stopped.

    Raises:
        ValueError: none of the run's checkpoints is good, the one of `checkpoint.load` is not, or it is of another
            model; says what is wrong with each.
    """
    own = _newest_good(run)
    if own is not None:
        return _load(own, engine, model, collector)
    load = other_run(config)
    if not load:
        return Progress()
    folder = on_rank_zero(lambda: find_checkpoint(load))
    verify(folder)
    if not config.finetune:
        return _load(folder, engine, model, collector)
    description = on_rank_zero(lambda: read_description(folder, model))
    name = "ema" if config.load_ema else "current"
    if config.load_ema and "ema" not in description["kept_weights"]:
        raise ValueError(f"checkpoint.load_ema: {folder} holds no EMA weights; set checkpoint.load_ema=false")
    state = engine.weights_state_dict(name)
    if name == "current":  # after what the model computes with, what the optimizer has of it
        main = OnDemand(sharded_main_copies(state, held_names(folder)))
        state = {"model": in_float32(state["model"]), "main": main}
    with torch.no_grad():
        engine.load_weights(read_tensors(folder, state))
    logger.info("started from the %s weights of %s", name, folder)
    return Progress()


def other_run(config: CheckpointConfig) -> str:
    """The run that `checkpoint.load` names, "" where it names this one: that is resumed from as soon as it is there."""
    is_this_one = os.path.realpath(config.load) == os.path.realpath(config.save)
    return "" if is_this_one else config.load


def _newest_good(run: RunFolder) -> Path | None:
    """The checkpoint to go on from, None in a fresh folder. Sets aside the damaged ones before it. Collective."""
    candidates = on_rank_zero(run.candidates)
    broken: dict[int, list[str]] = {}
    for iteration in candidates:
        found = _problems(run.checkpoint(iteration))
        if not found:
            on_rank_zero(functools.partial(_fall_back, run, iteration, broken))
            return run.checkpoint(iteration)
        broken[iteration] = found
    if broken:
        wrong = [line for found in broken.values() for line in found]
        on_rank_zero(lambda: _refuse(f"{run.path}: none of its checkpoints is good", wrong))
    return None


def _fall_back(run: RunFolder, iteration: int, broken: dict[int, list[str]]) -> None:
    if not broken:
        return
    wrong = [line for found in broken.values() for line in found]
    aside = [str(folder) for folder in map(run.set_aside, broken) if folder is not None]
    run.set_latest(iteration)
    logger.warning(
        "%s; going on from iteration %d. Kept aside: %s",
        listed(wrong),
        iteration,
        ", ".join(aside) or "nothing",
    )


def verify(folder: Path) -> None:
    """Compares a checkpoint with its manifest, each rank a share of its files. Collective.

    Raises:
        ValueError: on rank 0, PeerFailure on the others, when it is damaged; names what is wrong.
    """
    found = _problems(folder)
    if found:
        run = RunFolder(folder.parent)
        others = [run.checkpoint(i).name for i in run.iterations() if run.checkpoint(i) != folder]
        advice = f"other checkpoints there: {', '.join(others) or 'none'}"
        on_rank_zero(lambda: _refuse(f"{folder} is damaged", [*found, advice]))


def verified(folder: Path, ema: bool) -> Json:
    """What a checkpoint says of itself, when its files are as they were written. Collective.

    Args:
        ema: it must have an EMA.

    Raises:
        ValueError: as `verify` and `read_description`, or there is no EMA.
    """
    verify(folder)
    description = read_description(folder)
    if ema and "ema" not in description["kept_weights"]:
        raise ValueError(f"{folder} holds no EMA weights: the run was trained with train.ema_decay=0")
    return description


def _problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks. Collective."""
    world = dist.get_world_size()
    found: list[list[str]] = [[]] * world
    dist.all_gather_object(found, problems(folder, dist.get_rank(), world))
    return list(dict.fromkeys(line for part in found for line in part))


def _refuse(what: str, wrong: list[str]) -> None:
    raise ValueError(f"{what}: {listed(wrong)}")


def _load(folder: Path, engine: Stateful, model: Json, collector: Collecting | None) -> Progress:
    description = on_rank_zero(lambda: read_description(folder, model))
    _check_kept(folder, set(description["kept_weights"]), set(engine.weights))
    loader = description["loader"]
    if loader is None:  # of a checkpoint that convert wrote
        collector = None
    collected = {} if collector is None else collector.wanted(loader)
    wanted = engine.sharded_state_dict(is_loading=True)
    with torch.no_grad():
        found = read_tensors(folder, wanted | ({COLLECTED: collected} if collected else {}))
        tensors = found.pop(COLLECTED, {})
        engine.load_state_dict(found)
    if collector is not None:
        collector.load_state_dict(loader, tensors)
    logger.info("resumed from %s", folder)
    names = [f.name for f in dataclasses.fields(Progress)]
    return Progress(**{name: description[name] for name in names})


def _check_kept(folder: Path, saved: set[str], wanted: set[str]) -> None:
    if saved == wanted:
        return
    missing, extra = sorted(wanted - saved), sorted(saved - wanted)
    differs = f"holds no {', '.join(missing)} weights, which this recipe keeps"
    if extra:
        differs = f"holds {', '.join(extra)} weights, which this recipe does not keep"
    raise ValueError(
        f"{folder}: {differs} (ema: train.ema_decay, others: stage.name): resume it as it was, or start from its "
        "weights with checkpoint.load and checkpoint.finetune=true"
    )


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
    description = read_object(path, "take another checkpoint")
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {description.get('format')!r}, but this program reads format {FORMAT}"
        )
    _check_description(description, path)
    saved = description["model"]
    if model is not None and saved != (wanted := json.loads(json.dumps(model))):
        differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        told = ", ".join(
            f"{key} is {saved.get(key)!r} there and {wanted.get(key)!r} here" for key in differing
        )
        raise ValueError(f"{folder}: checkpoint of another model: {told}")
    return description


def _check_description(description: Json, path: Path) -> None:
    """ValueError naming the key of checkpoint.json that is missing or holds something else."""
    for key in ("iteration", "consumed_samples", "skipped_steps"):
        whole(description, key, path, least=0, most=2**62)
    expected: dict[str, type | UnionType] = {"model": dict, "kept_weights": list, "loader": dict | None}
    for key, kind in expected.items():
        if not isinstance(description.get(key, 0), kind):
            raise ValueError(f"{path}: {key} is not what this program writes there: take another checkpoint")
