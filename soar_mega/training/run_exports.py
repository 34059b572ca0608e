"""What a run leaves beside its checkpoints: diffusers folders. All that they need is tried before the first step."""

import logging
import math
import shlex
import shutil
from pathlib import Path

from soar_mega.checkpoints.model_card import notes_of_run
from soar_mega.checkpoints.resume import other_run
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.convert import WeightFiles, is_pipeline, pipeline_parts, save_folder
from soar_mega.convert.adapter_files import save_adapters
from soar_mega.distributed import is_rank_zero
from soar_mega.engines import Engine
from soar_mega.faults.agreement import PeerFailure, on_rank_zero
from soar_mega.models.common.build import DTYPES
from soar_mega.models.family import model_sizes
from soar_mega.outputs import OutputFolder, refuse_overlap

logger = logging.getLogger(__name__)


def check_places(recipe: Recipe) -> None:
    """ValueError where the run folder is, or lies in, what the run reads, or an export would replace it."""
    inputs = {
        "model.pipeline_dir": recipe.model.pipeline_dir,
        "data.path": recipe.data.path,
        "data.validation_path": recipe.data.validation_path,
        "data.prompts": recipe.data.prompts,
        "data.validation_prompts": recipe.data.validation_prompts,
        "checkpoint.load": other_run(recipe.checkpoint),
    }
    for name in ("export", "export_ema"):
        try:
            refuse_overlap(Path(recipe.checkpoint.save, name), inputs)
        except ValueError as error:
            raise ValueError(f"checkpoint.save: {error}") from error


def check_exports(recipe: Recipe) -> None:
    """Tries all that the exports will need, on one process; the run folder is there.

    Raises:
        ValueError: the pipeline to copy from is not complete, an export would replace what this program did not write,
            or the disk has too little room.
        OSError: a part cannot be read, or an export cannot be written.
    """
    wanted = _exports(recipe)
    for name in wanted:
        OutputFolder(_place(recipe, name)).check()
        if recipe.lora.rank:
            OutputFolder(Path(recipe.checkpoint.save, _adapters(name))).check()
    source = recipe.model.pipeline_dir
    parts = sum(pipeline_parts(source).values()) if wanted and is_pipeline(source) else 0
    sizes = model_sizes(recipe.model)
    elements = sum(len(entry.keys) * math.prod(entry.shape) for entry in sizes.family.entries(sizes))
    needed = len(wanted) * (parts + elements * DTYPES[_dtype(recipe)].itemsize)
    free = shutil.disk_usage(recipe.checkpoint.save).free
    if needed > free:
        raise ValueError(
            f"{recipe.checkpoint.save}: the export at the end of the run needs {needed / 2**30:.1f} GiB and the disk "
            f"has {free / 2**30:.1f} GiB left: make room, or set checkpoint.export=false and export elsewhere with "
            "`soar-mega convert`"
        )


def finish(recipe: Recipe, engine: Engine, iteration: int, consumed_samples: int) -> None:
    """Exports and writes the completion marker. Collective.

    Raises:
        OSError: an export could not be written; the run is complete all the same, and says how to make it again. On
            the other ranks than the first it is a PeerFailure.
    """
    run = RunFolder(recipe.checkpoint.save)
    try:
        _export(recipe, engine, iteration)
    except (OSError, ValueError) as error:
        on_rank_zero(lambda: run.mark_complete(iteration, consumed_samples, exported=False))
        raise (OSError if is_rank_zero() else PeerFailure)(_advice(recipe, error)) from error
    on_rank_zero(lambda: run.mark_complete(iteration, consumed_samples, recipe.checkpoint.export))


def _export(recipe: Recipe, engine: Engine, iteration: int) -> None:
    source, run = recipe.model.pipeline_dir, RunFolder(recipe.checkpoint.save)
    dtype = _dtype(recipe)
    exact = dtype == "fp32"
    for name, weights in _exports(recipe).items():
        place, tensors = _place(recipe, name), engine.exported(weights, exact)
        notes = notes_of_run(run, engine.model.sizes, iteration, weights, dtype)
        parts = source if is_pipeline(source) else None
        save_folder(engine.model, place, tensors, WeightFiles(dtype=DTYPES[dtype]), notes, parts)
        logger.info("wrote %s", place)
        if engine.adapters is not None:
            alone = run.path / _adapters(name)
            own = engine.tensors(weights, exact)
            save_adapters(engine.model, engine.adapters, recipe.lora, alone, own, source)
            logger.info("wrote %s", alone)


def _exports(recipe: Recipe) -> dict[str, str]:
    """By name in the run folder: which weights it holds."""
    if not recipe.checkpoint.export:
        return {}
    return {"export": "current"} | ({"export_ema": "ema"} if recipe.train.ema_decay > 0 else {})


def _dtype(recipe: Recipe) -> str:
    """Of an export's numbers."""
    asked = recipe.checkpoint.export_dtype
    return recipe.model.dtype if asked == "model" else asked


def _adapters(name: str) -> str:
    """The folder of the adapters that are in an export: export_lora, export_lora_ema."""
    return name.replace("export", "export_lora")


def _place(recipe: Recipe, name: str) -> Path:
    """A pipeline, or where there is none to copy from the transformer folder of one."""
    folder = Path(recipe.checkpoint.save, name)
    return folder if is_pipeline(recipe.model.pipeline_dir) else folder / "transformer"


def _advice(recipe: Recipe, error: Exception) -> str:
    run = recipe.checkpoint.save
    dtype = [] if _dtype(recipe) == recipe.model.dtype else ["--dtype", _dtype(recipe)]
    commands = [
        shlex.join(
            ["soar-mega", "convert", run, str(_place(recipe, name)), *dtype] + ["--ema"] * (weights == "ema")
        )
        for name, weights in _exports(recipe).items()
    ]
    return (
        f"{run} is trained to its end and saved, but could not be exported: {error}. Set that right, then: "
        f"{' && '.join(commands)} (or start the run again, which exports what it has)"
    )
