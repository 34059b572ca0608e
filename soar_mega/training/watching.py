"""Checkpoints of a run evaluated as they appear, with a curve of each score."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.distributed import is_rank_zero
from soar_mega.evaluation.suite.tables import Measured, Tables
from soar_mega.faults.agreement import PeerFailure, on_rank_zero
from soar_mega.training.evaluating import Evaluation, Model
from soar_mega.training.tensorboard import Events

log = logging.getLogger(__name__)

LOOK_AGAIN = 30.0  # seconds


def watch(
    evaluation: Evaluation, folder: str, first: Sequence[Measured], model: Callable[[Path], Model]
) -> list[Measured]:
    """Evaluates every checkpoint of a run until the run is complete, and reports after each. Collective.

    A checkpoint that the run removes before its turn is left out; one that an earlier start has evaluated stays.

    Args:
        first: what is reported before the checkpoints.
        model: of a checkpoint.

    Returns:
        `first` and all checkpoints.

    Raises:
        ValueError: there is no run in the folder.
    """
    run = RunFolder(folder)
    on_rank_zero(lambda: _check(run))
    measured, seen = list(first), set[int]()
    events: Events | None = None
    while True:
        # in this order: checkpoints that come between the two looks are seen in the next round
        is_complete = on_rank_zero(lambda: run.complete() is not None)
        there = on_rank_zero(run.iterations)
        known = on_rank_zero(lambda: _evaluated(evaluation, run)) if there else []
        new = sorted({*there, *known} - seen)
        for iteration in new:
            seen.add(iteration)
            try:
                found = evaluation.measure(on_rank_zero(partial(_model, model, run, iteration, there)))
            except (ValueError, OSError, PeerFailure) as error:
                if on_rank_zero(partial(_is_there, run, iteration)):
                    raise
                if is_rank_zero():
                    log.warning("iteration %d was removed before it could be evaluated: %s", iteration, error)
                continue
            measured.append(found)
            if is_rank_zero():
                # what an earlier start wrote of older checkpoints stays
                events = events or Events(evaluation.store.path, iteration - 1)
                events.scalars(_curves(evaluation.report(measured), found), iteration)
                events.flush()
        if is_complete and not new:
            break
        if not new:
            time.sleep(LOOK_AGAIN)
    if events is not None:
        events.close()
    return measured


def _evaluated(evaluation: Evaluation, run: RunFolder) -> list[int]:
    """Iterations that an earlier start began to evaluate."""
    facts = map(evaluation.store.read_json, evaluation.store.names("facts/iter_*.json"))
    paths = [Path(each["path"]) for each in facts if each is not None]
    return [int(path.name.partition("_")[2]) for path in paths if path.parent == run.path]


def _is_there(run: RunFolder, iteration: int) -> bool:
    return run.checkpoint(iteration).is_dir()


def _model(model: Callable[[Path], Model], run: RunFolder, iteration: int, there: Sequence[int]) -> Model:
    """A checkpoint; one that is gone is as one that is there but for its name."""
    if iteration in there:
        return model(run.checkpoint(iteration))
    other, folder = model(run.checkpoint(there[-1])), run.checkpoint(iteration)
    return replace(other, name=folder.name, source=replace(other.source, path=folder))


def _check(run: RunFolder) -> None:
    if not run.path.is_dir() or not run.is_one():
        raise ValueError(f"--watch {run.path}: this is no folder of a run")


def _curves(tables: Tables, model: Measured) -> dict[str, float]:
    """The scores of one model by the names of their curves."""
    scores = {
        f"{column.title}/guidance {point.guidance_scale:g}, {point.steps} steps": tables.resampled(
            model, point, column
        ).value
        for column in tables.columns()
        for point in tables.suite.points
    }
    drift = {
        f"drift/{span['from']:g} to {span['to']:g}, guidance {scale}": span["absolute"]
        for scale, spans in (model.drift or {"scales": {}})["scales"].items()
        for span in spans
    }
    return {f"evaluate/{name}": value for name, value in (scores | drift).items()}
