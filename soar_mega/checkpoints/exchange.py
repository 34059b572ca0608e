"""Between checkpoints of a run and diffusers folders, outside of a run."""

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from soar_mega.checkpoints import resume
from soar_mega.checkpoints.checkpoint import Progress, Saver
from soar_mega.checkpoints.reading import Stream, size
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.checkpoints.strict import check_keys
from soar_mega.config import CheckpointConfig, ModelConfig, ParallelConfig
from soar_mega.convert import (
    is_pipeline,
    load_diffusers,
    pipeline_parts,
    save_pipeline,
    save_transformer,
)
from soar_mega.convert.mapping import entries
from soar_mega.distributed import start_world
from soar_mega.engines.on_demand import OnDemand, without_room
from soar_mega.engines.weights import sharded_copy
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.mmdit import MMDiT, build_model
from soar_mega.outputs import OutputFolder, refuse_overlap


def checkpoint_to_diffusers(
    source: str | Path, out: str | Path, pipeline_dir: str | Path | None = None, ema: bool = False
) -> bool:
    """Writes the weights of a checkpoint as a diffusers folder; the layout they were trained at does not matter.

    Args:
        source: an iter_ folder, or a run folder, whose latest checkpoint is taken.
        pipeline_dir: where the other parts of a pipeline are copied from; None takes the one that the run started from.
        ema: the EMA weights in place of the current ones.

    Returns:
        Whether a whole pipeline was written; without a pipeline to copy from it is a transformer folder.

    Raises:
        ValueError: no checkpoint, one without EMA weights, or one that cannot be read; or `out` holds what this program
            did not write, or what is read lies in it or around it.
    """
    folder = resume.find_checkpoint(source)
    settings = _run_config(folder)
    parts = _parts(pipeline_dir, settings.get("pipeline_dir"))
    _check_place(out, folder, parts)
    start_world(ParallelConfig())
    resume.verify(folder)
    description = resume.read_description(folder)
    if ema and "ema" not in description["kept_weights"]:
        raise ValueError(f"{folder} holds no EMA weights: the run was trained with train.ema_decay=0")
    sizes = MMDiTConfig.from_diffusers(description["model"])
    dtype = ModelConfig(dtype=settings.get("dtype", "fp32"))
    model = build_model(sizes, dtype, ParallelConfig(), meta=True)
    tensors = StoredTensors(folder, model, ema)
    if parts:
        save_pipeline(model, parts, out, tensors)
    else:
        save_transformer(model, out, tensors)
    return bool(parts)


def _parts(pipeline_dir: str | Path | None, of_run: str | None) -> str | Path | None:
    """Where to copy the other parts of a pipeline from; None where the run had a transformer only."""
    named = pipeline_dir or of_run
    if not named or is_pipeline(named):
        return named
    if named == of_run and Path(named).is_dir():
        return None
    raise ValueError(
        f"{named} is not a diffusers pipeline folder: name the one to copy encoders from with --pipeline-dir"
    )


def _check_place(out: str | Path, checkpoint: Path, parts: str | Path | None) -> None:
    """Nothing is read yet, and nothing that is to be read is replaced. A run's own exports may be made anew."""
    run = RunFolder(checkpoint.parent)
    refuse_overlap(out, {"the checkpoint": checkpoint, "the pipeline": parts or ""})
    if run.is_one() and not run.is_export(out):
        refuse_overlap(out, {"the run": run.path})
    if parts:
        pipeline_parts(parts)
    OutputFolder(out).check()


def diffusers_to_checkpoint(source: str | Path, out: str | Path) -> Path:
    """Writes a transformer's weights as the checkpoint of a run at iteration 0, to be named in checkpoint.load together
    with checkpoint.finetune.

    Raises:
        ValueError: not an SD3 transformer, or `out` holds checkpoints already.
    """
    refuse_overlap(out, {"the source": source})
    run = RunFolder(out)
    if run.path.is_dir() and run.iterations():
        raise ValueError(f"{run.path} holds checkpoints already: give another folder")
    with run.lock():
        model = load_diffusers(source)
        saver = Saver(run, CheckpointConfig(async_save=False, keep_last=0), model.sizes.to_diffusers())
        saver.save(_Weights(model), Progress())
    return run.checkpoint(0)


class _Weights:
    """A model without optimizer, as a checkpoint sees it."""

    def __init__(self, model: MMDiT) -> None:
        self._model = model
        self.weights: dict[str, Any] = {}  # no EMA or other copies

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        return {"model": self._model.sharded_state_dict()}


def _run_config(folder: Path) -> dict[str, Any]:
    """The model group of the run that wrote a checkpoint; empty where its run_config.yaml is not beside it."""
    path = folder.parent / "run_config.yaml"
    if not path.is_file():
        return {}
    settings: dict[str, Any] = yaml.safe_load(path.read_text())["model"]
    return settings


class StoredTensors:
    """The weights of a checkpoint by name, asked for once each in the order of `convert`.

    They are read a few at a time: as many as are no more bytes than the largest one.

    Args:
        model: on the meta device.
        ema: the EMA in place of the parameters; the position table has none.

    Raises:
        ValueError: names or shapes in the checkpoint are not those of the model.
    """

    def __init__(self, folder: Path, model: MMDiT, ema: bool) -> None:
        state = model.sharded_state_dict()
        kept = sharded_copy(state, "ema", without_room) if ema else {}
        check_keys(folder, {"model": state, "kept": kept})
        stored = state | kept
        wanted = OnDemand({entry.name: stored[entry.name] for entry in entries(model.sizes)})
        self._read = Stream(folder, wanted, at_once=max(map(size, wanted.values()))).items()

    def __call__(self, name: str) -> Tensor:
        read, tensor = next(self._read)
        assert read == name
        return tensor
