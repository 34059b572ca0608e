"""One step of a run computed again, to find the sample or the layer that made it bad. The run folder is only read."""

import dataclasses
import math
from dataclasses import dataclass

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.distributed import is_rank_zero
from soar_mega.engines.sample_losses import SampleLoss
from soar_mega.faults.agreement import on_rank_zero, world
from soar_mega.training.anomalies import worst_samples
from soar_mega.training.loop import Steps, make_loader


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a step was like."""

    step: int
    start: int  # the iteration of the checkpoint that it was computed from, 0 without one
    loss: float
    grad_norm: float
    was_skipped: bool
    gradient_norms: dict[str, float]  # by part of the model: layers.0, x_embedder, ...
    samples: list[SampleLoss]  # of the global batch, worst first; on rank 0 only


def replay(recipe: Recipe, step: int) -> Replay | None:
    """Computes step `step` (from 1) of a run again, from its newest checkpoint before it or from the run's start.

    At the same layout, with the same code and deterministic kernels (those of CPUs are), every bit is as it was.

    Returns:
        What it was like on rank 0, None on the others.

    Raises:
        ValueError: the run has no such step, or cannot be started.
    """
    with world(recipe):
        if not 1 <= step <= recipe.train.train_iters:
            raise ValueError(
                f"--replay-step {step}: the steps of this run are 1 to {recipe.train.train_iters}"
            )
        run = RunFolder(recipe.checkpoint.save)
        before = on_rank_zero(lambda: max((i for i in _iterations(run) if i < step), default=None))
        if before is not None:
            source = dataclasses.replace(recipe.checkpoint, load=str(run.checkpoint(before)), finetune=False)
            recipe = dataclasses.replace(recipe, checkpoint=source)
        nothing = RunFolder(run.path / "replay")  # a folder that is never made: not the run's to resume
        steps = Steps(recipe, nothing, make_loader(recipe))
        try:
            if step <= steps.progress.iteration:
                raise ValueError(
                    f"--replay-step {step}: this run began with step {steps.progress.iteration + 1}, behind "
                    f"checkpoint.load={recipe.checkpoint.load}, whose run has the steps before"
                )
            computed = _computed(steps, step)
            return computed if is_rank_zero() else None
        finally:
            steps.close()


def _iterations(run: RunFolder) -> list[int]:
    return run.iterations() if run.path.is_dir() else []


def _computed(steps: Steps, step: int) -> Replay:
    start = steps.progress.iteration
    while steps.progress.iteration < step - 1:
        steps.collect()
        steps.learn()
        steps.update()
    steps.collect()
    loss = steps.learn()["loss"]
    norms = by_part(steps.engine.gradient_norms())
    samples = worst_samples(steps, None)
    result = steps.update()
    return Replay(
        step=step,
        start=start,
        loss=loss,
        grad_norm=result.grad_norm,
        was_skipped=not result.ok,
        gradient_norms=norms,
        samples=samples,
    )


def by_part(norms: dict[str, float]) -> dict[str, float]:
    """Norms by parameter as norms by part of the model: each layer, and each module outside of the layers."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        words = name.split(".")
        part = ".".join(words[:2]) if words[0] == "layers" else words[0]
        squares[part] = squares.get(part, 0.0) + norm * norm
    return {part: math.sqrt(square) for part, square in squares.items()}


def as_text(replayed: Replay) -> str:
    """Everything, for a person to read."""
    lines = [
        f"step {replayed.step}, computed from iteration {replayed.start}: loss {replayed.loss!r}, "
        f"gradient norm {replayed.grad_norm!r}"
        + (", skipped: the weights stayed as they were" if replayed.was_skipped else ""),
        "gradient norm by part of the model:",
        *(f"  {norm:12.5E}  {part}" for part, norm in replayed.gradient_norms.items()),
        "samples, the worst first (position in training, index in the data, source; losses of its points):",
    ]
    for sample in replayed.samples:
        lines.append(f"  {sample.position:9d} {sample.index:9d}  {sample.name}")
        told = (f"{p.kind} sigma {p.sigma:.4f}: {p.loss:.5E}" for p in sample.points)
        lines.append(f"      {' | '.join(told) or 'not learned from'}")
    return "\n".join(lines)
