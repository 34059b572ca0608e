"""Between checkpoints of a run and diffusers folders, outside of a run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.checkpoints import resume
from soar_mega.checkpoints.adapters import ADAPTERS, adapted_model
from soar_mega.checkpoints.checkpoint import Progress, Saver
from soar_mega.checkpoints.model_card import notes_of_run
from soar_mega.checkpoints.reading import Stream, size
from soar_mega.checkpoints.recipes import model_settings
from soar_mega.checkpoints.run_folder import RunFolder, check_place
from soar_mega.checkpoints.strict import check_keys, held_names
from soar_mega.config import CheckpointConfig, ModelConfig, ParallelConfig
from soar_mega.convert import (
    AS_STORED,
    WeightFiles,
    is_pipeline,
    pipeline_parts,
    save_folder,
    save_original_file,
)
from soar_mega.convert.finite_tensors import is_finite
from soar_mega.convert.load import refuse_broken
from soar_mega.convert.pipeline_folder import refuse_other_transformer
from soar_mega.convert.weights import Weights
from soar_mega.distributed import start_world
from soar_mega.engines.kept_weights import sharded_copy, sharded_main_copies
from soar_mega.engines.on_demand import OnDemand, without_room
from soar_mega.engines.sampling import ShardedModel
from soar_mega.engines.saved_pieces import UnreadTensor
from soar_mega.faults.agreement import on_rank_zero
from soar_mega.models.common.build import build_model
from soar_mega.models.common.chunks import ModelChunks
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.tensor_map import Entry, parts
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import read_sizes
from soar_mega.outputs import OutputFolder, refuse_overlap

# what a transformer takes of the encoders beside it
OF_ENCODERS = ("in_channels", "joint_attention_dim", "pooled_projection_dim")


def checkpoint_to_folder(
    source: str | Path,
    out: str | Path,
    pipeline_dir: str | Path | None = None,
    ema: bool = False,
    files: WeightFiles = AS_STORED,
    only_transformer: bool = False,
) -> bool:
    """Writes the weights of a checkpoint as a diffusers folder; the layout they were trained at does not matter.

    Args:
        source: an iter_ folder, or a run folder, whose latest checkpoint is taken.
        pipeline_dir: where the other parts of a pipeline are copied from; None takes the one that the run started from.
        ema: the EMA weights in place of the current ones.
        only_transformer: leave out the other parts.

    Returns:
        Whether a whole pipeline was written; without a pipeline to copy from it is a transformer folder.

    Raises:
        ValueError: no checkpoint, one without EMA weights, or one that cannot be read; or `out` holds what this program
            did not write, or what is read lies in it or around it.
    """
    folder = resume.find_checkpoint(source)
    parts = None if only_transformer else _parts(pipeline_dir, model_settings(folder).get("pipeline_dir"))
    check_place(out, folder)
    if parts:
        refuse_overlap(out, {"the pipeline": parts})
        pipeline_parts(parts)
    OutputFolder(out).check()
    model, tensors = _open(folder, ema, files.dtype)
    iteration = resume.read_description(folder)["iteration"]
    name = "ema" if ema else "current"
    notes = notes_of_run(RunFolder(folder.parent), model.sizes, iteration, name, files.dtype_name)
    save_folder(model, out, tensors, files, notes, parts)
    return bool(parts)


def checkpoint_to_original_file(
    source: str | Path, out: str | Path, ema: bool = False, files: WeightFiles = AS_STORED, prefix: str = ""
) -> None:
    """Writes the weights of a checkpoint as a single file in the layout of their family.

    Raises what `checkpoint_to_folder` does.
    """
    folder = resume.find_checkpoint(source)
    check_place(out, folder)
    model, tensors = _open(folder, ema, files.dtype)
    save_original_file(model, out, tensors, files, prefix)


def _open(folder: Path, ema: bool, dtype: torch.dtype | None) -> tuple[Transformer, Callable[[str], Tensor]]:
    """The model of a verified checkpoint, without memory, and its weights by name.

    Args:
        dtype: that they will be written in; None is that of the run.
    """
    start_world(ParallelConfig())
    description = resume.verified(folder, ema)
    settings = model_settings(folder)
    exact = dtype == torch.float32
    if ADAPTERS in description["model"]:
        return adapted_model(folder, description, settings, ema, exact)
    name = settings.get("dtype", "fp32") if dtype is None else "fp32"
    model = build_model(
        read_sizes(description["model"]), ModelConfig(dtype=name), ParallelConfig(), meta=True
    )
    return model, StoredTensors(folder, model, ema, exact)


def load_model(source: str | Path, dtype: str, parallel: ParallelConfig, ema: bool = False) -> ShardedModel:
    """The model of a checkpoint, ready to predict at any layout. Collective; starts the world.

    Raises what `checkpoint_to_folder` does for the checkpoint, and ValueError for a layout that is not possible.
    """
    start_world(parallel)
    folder = on_rank_zero(lambda: resume.find_checkpoint(source))
    description = resume.verified(folder, ema)
    if ADAPTERS in description["model"]:
        raise ValueError(
            f"{folder} holds adapters without their base: convert it with `soar-mega convert`, then draw with what "
            "that wrote"
        )
    sharded = ShardedModel(read_sizes(description["model"]), ModelConfig(dtype=dtype), parallel)
    tensors, broken = named_tensors(sharded.model), []
    with torch.no_grad():
        for name, tensor in Stream(folder, OnDemand(_stored(folder, sharded.model, ema))).items():
            tensors[name].copy_(tensor)
            if not is_finite(tensor):
                broken.append(name)
    refuse_broken(broken, folder)
    return sharded


def pipeline_of(source: str | Path, named: str | Path | None) -> Path:
    """The pipeline folder whose encoders belong to a checkpoint: the one that is named, or the run's own.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    checkpoint = resume.find_checkpoint(source)
    folder = named or model_settings(checkpoint).get("pipeline_dir")
    if not folder or not is_pipeline(folder):
        raise ValueError(
            f"{source} came from no diffusers pipeline folder that is there: name one with --pipeline-dir"
        )
    sizes, other = read_sizes(resume.read_description(checkpoint)["model"]), read_sizes(folder)
    refuse_other_transformer(folder, sizes.family.class_name)
    for name in OF_ENCODERS:
        if (made := getattr(other, name)) != (wanted := getattr(sizes, name)):
            raise ValueError(
                f"{folder} has the encoders of a transformer with {name} {made}, and that of {checkpoint} has "
                f"{wanted}: name the pipeline folder that it was trained with by --pipeline-dir"
            )
    return Path(folder)


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


def weights_to_checkpoint(weights: Weights, source: str | Path, out: str | Path, dtype: str = "fp32") -> Path:
    """Writes a transformer's weights as the checkpoint of a run at iteration 0, to be named in checkpoint.load together
    with checkpoint.finetune.

    Args:
        source: where the weights are, for messages.

    Raises:
        ValueError: `out` holds checkpoints already, or is where the weights are.
        OSError: it could not be written, because the weights are broken for instance.
    """
    refuse_overlap(out, {"the source": source})
    run = RunFolder(out)
    if run.path.is_dir() and run.iterations():
        raise ValueError(f"{run.path} holds checkpoints already: give another folder")
    start_world(ParallelConfig())
    with run.lock():
        model = build_model(weights.sizes, ModelConfig(dtype=dtype), ParallelConfig(), meta=True)
        saver = Saver(run, CheckpointConfig(async_save=False, keep_last=0), model.sizes.to_diffusers())
        saver.save(_Unread(model, weights), Progress())
    return run.checkpoint(0)


class _Unread:
    """A model without optimizer as a checkpoint sees it, whose tensors are read one after another."""

    def __init__(self, model: Transformer, weights: Weights) -> None:
        self._model, self._weights = model, weights
        self.weights: dict[str, Any] = {}  # no EMA or other copies

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        tensors, table = named_tensors(self._model), self._model.sizes.family.entries(self._model.sizes)
        return {
            "pieces": [
                UnreadTensor(
                    entry.name,
                    tuple(tensors[entry.name].shape),
                    tensors[entry.name].dtype,
                    functools.partial(self._read, entry, tensors[entry.name]),
                )
                for entry in table
            ]
        }

    def _read(self, entry: Entry, like: Tensor) -> Tensor:
        tensor = torch.empty_like(like, device="cpu", requires_grad=False)
        heads = self._model.sizes.num_attention_heads
        for key, place in zip(entry.keys, parts(tensor, entry, heads), strict=True):
            whole = self._weights.read(key, like.dtype)
            columns = entry.columns
            place.copy_(
                (whole if columns is None else whole[:, columns.start : columns.stop]).reshape(place.shape)
            )
        return tensor


class StoredTensors:
    """The weights of a checkpoint by name, asked for once each in the order of `convert`.

    They are read a few at a time: as many as are no more bytes than the largest one.

    Args:
        model: on the meta device.
        ema: the EMA in place of the parameters; the position table has none.
        exact: the optimizer's float32 copies in place of the parameters, where the checkpoint holds them.

    Raises:
        ValueError: names or shapes in the checkpoint are not those of the model, or a tensor holds NaN.
    """

    def __init__(self, folder: Path, model: Transformer, ema: bool, exact: bool = False) -> None:
        self._folder = folder
        stored = _stored(folder, model, ema, exact)
        wanted = OnDemand(
            {entry.name: stored[entry.name] for entry in model.sizes.family.entries(model.sizes)}
        )
        self._read = Stream(folder, wanted, at_once=max(map(size, wanted.values()))).items()

    def __call__(self, name: str) -> Tensor:
        read, tensor = next(self._read)
        assert read == name
        refuse_broken([] if is_finite(tensor) else [name], self._folder)
        return tensor


def _stored(folder: Path, model: Transformer | ModelChunks, ema: bool, exact: bool = False) -> dict[str, Any]:
    """What a checkpoint must hold for this rank's part of a model, by name. Collective.

    Raises:
        ValueError: names or shapes in the checkpoint are not those of the model.
    """
    state = model.sharded_state_dict()
    kept = sharded_copy(state, "ema", without_room) if ema else {}
    check_keys(folder, {"model": state, "kept": kept})
    if exact and not ema:
        kept = sharded_main_copies(state, held_names(folder))
    return state | kept
