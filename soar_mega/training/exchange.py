"""Between checkpoints of a run and diffusers folders, outside of a run."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from soar_mega.config import CheckpointConfig, ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers, save_pipeline, save_transformer
from soar_mega.distributed import start_world
from soar_mega.engines.weights import sharded_copy
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.mmdit import MMDiT, build_model
from soar_mega.models.names import global_parameter_names
from soar_mega.training import resume
from soar_mega.training.checkpoint import Progress, Saver
from soar_mega.training.run_folder import RunFolder


def checkpoint_to_diffusers(
    source: str | Path, out: str | Path, pipeline: str | Path | None = None, ema: bool = False
) -> bool:
    """Writes the weights of a checkpoint as a diffusers folder; the layout they were trained at does not matter.

    Args:
        source: an iter_ folder, or a run folder, whose latest checkpoint is taken.
        pipeline: where the other parts of a pipeline are copied from; None takes the one that the run started from.
        ema: the EMA weights in place of the current ones.

    Returns:
        Whether a whole pipeline was written; without a pipeline to copy from it is a transformer folder.

    Raises:
        ValueError: no checkpoint, one without EMA weights, or one that cannot be read.
    """
    folder = resume.find_checkpoint(source)
    settings = _run_config(folder)
    parts = pipeline or settings.get("pipeline")
    if parts and not Path(parts, "model_index.json").is_file():
        raise ValueError(
            f"{parts} is not a diffusers pipeline folder: name the one to copy encoders from with --pipeline"
        )
    start_world(ParallelConfig())
    resume.verify(folder)
    sizes = MMDiTConfig.from_diffusers(resume.read_description(folder)["model"])
    model = build_model(sizes, ModelConfig(dtype=settings.get("dtype", "fp32")), ParallelConfig())
    _load_current(model, folder)  # also for the EMA, which has no copy of the position table
    tensors = _load_ema(model, folder) if ema else None
    if parts:
        save_pipeline(model, parts, out, tensors)
    else:
        save_transformer(model, out, tensors)
    return bool(parts)


def diffusers_to_checkpoint(source: str | Path, out: str | Path) -> Path:
    """Writes a transformer's weights as the checkpoint of a run at iteration 0, to be named in checkpoint.load together
    with checkpoint.finetune.

    Raises:
        ValueError: not an SD3 transformer, or `out` holds checkpoints already.
    """
    run = RunFolder(out)
    if run.path.exists() and run.latest() is not None:
        raise ValueError(f"{run.path} holds checkpoints already: give another folder")
    model = load_diffusers(source)
    run.path.mkdir(parents=True, exist_ok=True)
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


@torch.no_grad()
def _load_current(model: MMDiT, folder: Path) -> None:
    state = model.sharded_state_dict()
    targets = {
        key: value.data for key, value in state.items() if isinstance(getattr(value, "data", None), Tensor)
    }
    for key, tensor in resume.read_tensors(folder, {"model": state})["model"].items():
        if key in targets:
            targets[key].copy_(tensor)


def _load_ema(model: MMDiT, folder: Path) -> dict[str, Tensor]:
    if "ema" not in resume.read_description(folder)["kept_weights"]:
        raise ValueError(f"{folder} holds no EMA weights: the run was trained with train.ema_decay=0")
    wanted = sharded_copy(
        model.sharded_state_dict(), "ema", lambda p: torch.empty(p.shape, dtype=torch.float32)
    )
    loaded = resume.read_tensors(folder, {"kept": wanted})["kept"]
    return {name: loaded[name] for name in global_parameter_names(model)}
