"""soar-mega evaluate --suite"""

import argparse
import contextlib
import dataclasses
import errno
import logging
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from soar_mega.cli.adapted import split_adapted
from soar_mega.cli.numbers import check_at_least_one

if TYPE_CHECKING:
    from soar_mega.evaluation.suite.suite_settings import Suite
    from soar_mega.evaluation.suite.tables import Tables
    from soar_mega.training.evaluating import Evaluation, Model

log = logging.getLogger(__name__)

UNFINISHED = 75
WAITING = timedelta(hours=2)  # of a rank for others that still draw


def check(arguments: argparse.Namespace) -> None:
    """ValueError for what can be seen to be wrong without loading anything."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    check_at_least_one(arguments, "batch_size", "drift_samples", "drift_steps", *sizes)
    if not arguments.out:
        raise ValueError("--suite writes a folder of images, scores and a report: name it with --out DIR")
    if not arguments.models and not arguments.watch:
        raise ValueError("no model: give [NAME=]MODEL, or --watch RUN")


def run_suite(arguments: argparse.Namespace) -> int:
    """Draws, scores and reports. Collective over the processes of the command."""
    check(arguments)

    from soar_mega.cli.process import start_process

    start_process()

    from soar_mega.distributed import is_rank_zero
    from soar_mega.training.watching import watch

    models = _models(arguments)
    evaluation = _evaluation(arguments)
    if is_rank_zero():
        tell_text_lengths(models)
    with (
        evaluation.store.lock() if is_rank_zero() else contextlib.nullcontext(),
        explained(arguments.out),
        _ended_by_signals(),
    ):
        measured = [evaluation.measure(model) for model in models]
        if arguments.watch:
            measured = watch(
                evaluation,
                arguments.watch,
                measured,
                lambda folder: _model(f"{folder.name}={folder}", arguments),
            )
        if not measured:
            raise ValueError(f"{arguments.watch} is complete and holds no checkpoint that could be evaluated")
        if is_rank_zero():
            print("\n".join(table(evaluation.report(measured))))
            print(
                f"\nthe report is {arguments.out}/report.html, its numbers are in report.json and table.csv"
            )
    return 0


def _evaluation(arguments: argparse.Namespace) -> "Evaluation":
    """All but the models, checked before the first image. Starts the world."""
    from soar_mega.config import ParallelConfig
    from soar_mega.distributed import device, start_world
    from soar_mega.evaluation.suite.distances import check_distances
    from soar_mega.evaluation.suite.prompt_sets import read_prompt_set
    from soar_mega.evaluation.suite.scoring import check_prompts, make_scorers
    from soar_mega.evaluation.suite.store import TINY_WEIGHTS, Store
    from soar_mega.faults.agreement import on_rank_zero
    from soar_mega.training.evaluating import Evaluation

    suite = _suite(arguments)
    sets = [read_prompt_set(each) for each in suite.sets]
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
    )
    start_world(parallel, WAITING)
    store = Store(arguments.out)
    on_rank_zero(store.check)
    names = [name for each in suite.sets for name in each.scorers]
    weights_dir = arguments.weights
    if suite.tiny_weights:
        from soar_mega.evaluation.scorers.tiny import replace_tiny_weights

        weights_dir = str(store.path / TINY_WEIGHTS)
        on_rank_zero(lambda: replace_tiny_weights(names, Path(weights_dir)))
    scorers = make_scorers(names, weights_dir, device())
    check_prompts(sets, scorers)
    check_distances(sets, weights_dir)
    return Evaluation(
        store=store,
        suite=suite,
        sets=sets,
        scorers=scorers,
        parallel=parallel,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        weights_dir=weights_dir,
    )


def _suite(arguments: argparse.Namespace) -> "Suite":
    from soar_mega.evaluation.suite.suite_settings import DriftSettings, load_suite, sampled_at

    suite = sampled_at(
        load_suite(arguments.suite, arguments.prompts), arguments.guidance_scale, arguments.steps
    )
    if suite.tiny_weights and arguments.weights:
        raise ValueError(
            f"--weights: the suite {suite.name} makes its own, as its file says by `weights: tiny`"
        )
    drift = DriftSettings(
        held_out=arguments.held_out, samples=arguments.drift_samples, steps=arguments.drift_steps
    )
    seed = suite.seed if arguments.seed is None else arguments.seed
    return dataclasses.replace(suite, drift=drift, seed=seed)


def table(tables: "Tables") -> list[str]:
    """A line for each model and point: its scores, each with its standard error."""
    columns = tables.columns()
    width = max(len(model.name) for model in tables.models) + 2
    lines = [f"{'':<{width}}{'':<24}" + "".join(f"{column.title:>24}" for column in columns)]
    for model in tables.models:
        for point in tables.suite.points:
            cells = []
            for column in columns:
                found = tables.score(model, point, column)
                cells.append(f"{f'{found.value:.4g} +- {found.standard_error:.2g}':>24}")
            lines.append(f"{model.name:<{width}}{point!s:<24}" + "".join(cells))
    return lines


def _models(arguments: argparse.Namespace) -> "list[Model]":
    """All that are named. ValueError where two have one name, or one cannot be drawn with at the layout."""
    from soar_mega.checkpoints.model_source import CHECKPOINT

    models = [_model(text, arguments) for text in arguments.models]
    if len({model.name for model in models}) < len(models):
        raise ValueError("two models have one name: tell them apart, as in before=MODEL after=MODEL")
    whole = [model.name for model in models if model.source.kind != CHECKPOINT]
    if whole and max(arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size) > 1:
        raise ValueError(
            f"{whole[0]} is a pipeline folder, which lies whole on each process: evaluate checkpoints at a layout of "
            "their own with the same --out before, then all models without one; nothing is drawn twice"
        )
    return models


def tell_text_lengths(models: "list[Model]") -> None:
    """Warns where models that are compared are told prompts of different lengths."""
    from soar_mega.checkpoints.model_source import DIFFUSERS

    own = [model for model in models if model.source.kind != DIFFUSERS]
    lengths = {model.name: model.source.text_length() for model in own}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        log.warning(
            "prompts are cut at different numbers of T5 tokens: %s; --max-sequence-length gives all models one",
            said,
        )


def _model(text: str, arguments: argparse.Namespace) -> "Model":
    """[NAME=]MODEL[@WIDTHxHEIGHT]."""
    from soar_mega.checkpoints.model_source import find_source, split_size
    from soar_mega.convert import is_pipeline
    from soar_mega.data.info import bucket_size
    from soar_mega.training.evaluating import Model

    name, equals, path = text.partition("=")
    path, size = split_size(path if equals else text)
    pipeline_dir, adapters = split_adapted(path)
    is_checkpoint = not is_pipeline(pipeline_dir)
    source = find_source(
        pipeline_dir,
        adapters,
        arguments.pipeline_dir if is_checkpoint else None,
        arguments.ema and is_checkpoint,
        arguments.shift,
        arguments.max_sequence_length,
    )
    return Model(name=name if equals else path, source=source, size=bucket_size(size) if size else None)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What a scheduler sends before the end of a job's time ends this process at once, as unfinished.

    Files are written whole or not at all, so there is nothing to be saved.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"soar-mega: told to stop; start the same command again to go on\n")
        os._exit(UNFINISHED)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explained(out: str) -> Iterator[None]:
    """A full disk ends the evaluation with what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"there is no room left for {out} ({error}). All images and scores made so far are kept: make room and "
            "start the same command again, which goes on from there"
        ) from error
