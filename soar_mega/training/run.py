"""A run from its recipe to its completion marker: steps, measurements, checkpoints, export."""

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from soar_mega import distributed
from soar_mega.checkpoints.checkpoint import Saved, Saver
from soar_mega.checkpoints.lineage import record_start
from soar_mega.checkpoints.recipes import changes_since, tell_differences, write_recipe
from soar_mega.checkpoints.resume import find_checkpoint, other_run
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.data.info import DataError
from soar_mega.engines.statistics import quantiles
from soar_mega.faults.agreement import on_rank_zero, world
from soar_mega.faults.signals import StopRequest
from soar_mega.faults.stragglers import Stragglers
from soar_mega.faults.watchdog import Watchdog, reports_folder
from soar_mega.phases import phases
from soar_mega.training.anomalies import Anomalies
from soar_mega.training.collection_report import CollectionReport
from soar_mega.training.logs import Interval, log_line
from soar_mega.training.loop import Steps, make_loader
from soar_mega.training.measurements import Measurements
from soar_mega.training.memory_report import log_memory
from soar_mega.training.progress import drawing_bar, progress_bar
from soar_mega.training.run_exports import check_exports, check_places, finish
from soar_mega.training.samples import encode_sample_prompts
from soar_mega.training.tensorboard import Events, peak_memory_gib
from soar_mega.training.throughput import Throughput

logger = logging.getLogger(__name__)

COMPLETE, UNFINISHED = 0, 75  # exit codes; 75 is EX_TEMPFAIL: start the same command again


def train(recipe: Recipe) -> int:
    """Runs a recipe, on all processes of its world; starts and stops the world.

    Returns:
        0 when train_iters was reached and the marker file is written, 75 when the run was asked to stop before: it is
        saved and goes on when started again.

    Raises:
        ValueError, OSError: what a user can set right, and train.max_skipped_steps steps in a row without a finite
            loss and gradient; the run folder is left in a state to resume from.
        With more than one process nothing is raised: the process says what happened and ends with exit code 1, so that
        no peer waits for it.
    """
    with StopRequest(recipe.train.exit_duration_in_mins) as stop, world(recipe):
        phases.restart()
        return _run(recipe, stop)


def _run(recipe: Recipe, stop: StopRequest) -> int:
    run = RunFolder(recipe.checkpoint.save)
    on_rank_zero(lambda: check_places(recipe))
    with contextlib.ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(run.lock()))
        stack.enter_context(_log_file(run.path))
        if on_rank_zero(lambda: _is_complete(run, recipe)):
            return COMPLETE
        on_rank_zero(lambda: _prepare_folder(run, recipe))
        on_rank_zero(lambda: check_exports(recipe))
        stack.enter_context(Watchdog(reports_folder(run.path), recipe.train))
        trainer = Trainer(recipe, run)
        stack.callback(trainer.close)
        # what there is by now stays: megatron has garbage collected at each save, which would walk over all of it
        gc.freeze()
        stack.callback(gc.unfreeze)
        started = trainer.progress.iteration
        on_rank_zero(lambda: _record(run, recipe, started))
        return trainer.run_steps(stop)


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """Rank 0 logs into train.log too; the other ranks only warn."""
    package = logging.getLogger("soar_mega")
    if not distributed.is_rank_zero():
        package.setLevel(logging.WARNING)
        yield
        return
    handler = logging.FileHandler(folder / "train.log")
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s"))
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _is_complete(run: RunFolder, recipe: Recipe) -> bool:
    said = run.complete()
    if said is None:
        return False
    exported = said.get("exported", True) or not recipe.checkpoint.export
    if said["iteration"] >= recipe.train.train_iters and exported:
        logger.info("%s is complete (%d iterations): nothing to do", run.path, said["iteration"])
        if changes := changes_since(run, recipe):
            logger.warning(
                "it ran with another recipe; to run this one, give another checkpoint.save:\n  %s",
                "\n  ".join(changes),
            )
        return True
    logger.info("%s was complete at iteration %d and goes on", run.path, said["iteration"])
    run.reopen()
    return False


def _prepare_folder(run: RunFolder, recipe: Recipe) -> None:
    run.clean()
    load = other_run(recipe.checkpoint)
    if load and not run.candidates():
        tell_differences(find_checkpoint(load), recipe)


def _record(run: RunFolder, recipe: Recipe, started: int) -> None:
    # not before all checks: what is drawn with, converted or described as trained goes by run_config.yaml
    write_recipe(run, recipe)
    record_start(run, recipe, dist.get_world_size(), started)


class Trainer(Steps):
    """The steps of a run, and what is kept of them. Everything is collective over the world."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        loader = make_loader(recipe)
        prompts = encode_sample_prompts(recipe, loader.info)  # before the engine takes the device's memory
        super().__init__(recipe, run, loader)
        log_memory(recipe, self.engine.model.sizes, loader.info)
        self.run = run
        self.saved = on_rank_zero(run.latest) or 0  # of the run's own newest checkpoint
        self.saver = Saver(run, recipe.checkpoint, self.sizes, self.note)
        self.skipped_in_a_row = 0
        on_disk = run.path if distributed.is_rank_zero() and recipe.logging.tensorboard else None
        # a start that stopped behind the drawing has told of the collection at the step that follows
        was_told = self.collector is not None and self.collector.is_untouched
        self.events = Events(on_disk, self.progress.iteration + was_told)
        schedule, info = self.stage.schedule, self.loader.info
        self.measurements = Measurements(
            recipe, run.path, self.engine, schedule, info, prompts, self.events, self.collector
        )
        self.collections = None
        if self.collector is not None:
            self.collections = CollectionReport(self.collector, run.path, recipe.logging, self.events)
        self.interval = Interval()
        self.throughput = Throughput(recipe, self.engine.model.sizes)
        self.anomalies = Anomalies(run.path, recipe.logging.loss_spike_factor, self.stage.kinds[0])
        self.stragglers = Stragglers(recipe.logging.straggler_factor)

    def close(self) -> None:
        """Ends reader processes and files."""
        self.saver.close()
        super().close()
        self.events.close()

    def run_steps(self, stop: StopRequest) -> int:
        """All remaining steps, then the export and the marker. Returns the exit code."""
        try:
            return self._run_steps(stop)
        except DataError:  # raised on all ranks alike: none is missed
            phases.leave_step("checkpoint")
            self.saver.rescue()
            raise

    def _run_steps(self, stop: StopRequest) -> int:
        progress, train_iters = self.progress, self.recipe.train.train_iters
        if progress.iteration == 0:
            self.measurements.take(0)
        with progress_bar(progress.iteration, train_iters, shown=distributed.is_rank_zero()) as bar:
            while progress.iteration < train_iters:
                self.draw(stop)
                phases.begin_step(progress.iteration + 1, "agreement")
                reason = stop.reason()
                if reason is not None:
                    phases.leave_step("checkpoint")
                    self.save(wait=True)
                    logger.info(
                        "stopped by %s at iteration %d: saved, not finished", reason, progress.iteration
                    )
                    return UNFINISHED
                loss = self.step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                phases.leave_step("measurements")
                self.measurements.take(progress.iteration)
                phases.leave_step("checkpoint")
                if progress.iteration % self.recipe.checkpoint.save_interval == 0:
                    self.save()
                self.saver.poll()
        self.save(wait=True)
        phases.leave_step("export")
        finish(self.recipe, self.engine, progress.iteration, progress.consumed_samples)
        logger.info("complete: %d iterations", progress.iteration)
        return COMPLETE

    def draw(self, stop: StopRequest) -> None:
        """The next collection, where the next step needs one; given up when the run is asked to stop."""
        if self.collections is None or not self.collections.collector.is_empty:
            return
        with drawing_bar(self.collections.collector.place.samples, distributed.is_rank_zero()) as bar:

            def watch(drawn: int) -> bool:
                bar.update(drawn - bar.n)
                return stop.reason() is not None

            found = self.collect(watch)
        if found is not None:
            self.interval.seconds += found.seconds
            info = self.loader.info
            latents = info.latent_shape(info.largest_bucket)[1:]
            self.throughput.drew(latents, info.text_shape[0], len(found.advantages), found.seconds)
            self.collections.report(found, self.progress.iteration + 1)

    def step(self) -> float:
        """One optimizer step; its loss."""
        started = time.perf_counter()
        recipe, progress = self.recipe, self.progress
        statistics = self.learn()
        result = self.update()
        seconds = time.perf_counter() - started
        phases.enter("report")
        self.anomalies.look(self, statistics, result)
        self.skipped_in_a_row = 0 if result.ok else self.skipped_in_a_row + 1
        self.interval.add(statistics, recipe.train.global_batch_size, result.ok, seconds)
        self.throughput.add(self.batch, seconds)
        if (
            progress.iteration % recipe.logging.log_interval == 0
            or progress.iteration == recipe.train.train_iters
        ):
            self.report(result.grad_norm)
        if self.skipped_in_a_row >= recipe.train.max_skipped_steps:
            self.give_up(statistics["loss"], result.grad_norm)
        return statistics["loss"]

    def report(self, grad_norm: float) -> None:
        """The log line and the curves of the steps since the last one."""
        interval, progress, train = self.interval, self.progress, self.recipe.train
        throughput = self.throughput.take()
        line = log_line(
            interval,
            iteration=progress.iteration,
            train_iters=train.train_iters,
            consumed_samples=progress.consumed_samples,
            learning_rate=self.rate,
            global_batch_size=train.global_batch_size,
            grad_norm=grad_norm,
            throughput=throughput,
        )
        logger.info("%s", line)
        values = {
            **interval.averages(),
            **quantiles(self.engine.learned[0]),
            "grad-norm": grad_norm,
            "learning-rate": self.rate,
            "skipped-steps": progress.skipped_steps,
            "iteration-time": interval.seconds / interval.steps,
            "throughput/samples-per-second": interval.samples / interval.seconds,
            **{f"throughput/{name}": value for name, value in throughput.items()},
            "memory/peak-gib": peak_memory_gib(),
            **self.stragglers.compare(interval.steps),
        }
        self.events.scalars(values, progress.iteration)
        self.interval = Interval()

    def give_up(self, loss: float, grad_norm: float) -> None:
        """Saves and raises: too many steps in a row had no finite loss and gradient."""
        phases.leave_step("checkpoint")
        self.save(wait=True)
        raise ValueError(
            f"{self.skipped_in_a_row} steps in a row were skipped (train.max_skipped_steps), the last one with loss "
            f"{loss} and gradient norm {grad_norm}. The state at iteration {self.progress.iteration} is saved in "
            f"{self.run.path}; no skipped step changed the weights. Look at the data, or lower optimizer.lr and start "
            "from an earlier checkpoint"
        )

    def save(self, wait: bool = False) -> None:
        """A checkpoint of this iteration, unless it has one; with `wait` it can be resumed from on return."""
        progress = self.progress
        if progress.iteration != self.saved:
            progress.loader = self.loader.state_dict()
            pieces = [] if self.collector is None else self.collector.pieces()
            self.saver.save(self.engine, progress, pieces)
            self.saved = progress.iteration
        if wait:
            self.saver.finish()

    def note(self, saved: Saved) -> None:
        """The curve of a checkpoint's cost; what there is on the curves is as durable as the checkpoint."""
        self.events.scalars({"save/blocked-seconds": saved.blocked_seconds}, saved.iteration)
        self.events.flush()
