"""Checkpoints of a run that trains adapters: they hold the adapters, and know their base by its fingerprint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soar_mega.checkpoints import resume
from soar_mega.checkpoints.checkpoint import Json
from soar_mega.checkpoints.reading import read_tensors
from soar_mega.checkpoints.recipes import model_settings
from soar_mega.checkpoints.run_folder import check_place
from soar_mega.checkpoints.strict import held_names
from soar_mega.config import LoraConfig, ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers
from soar_mega.convert.adapter_files import save_adapters
from soar_mega.convert.finite_tensors import is_finite
from soar_mega.convert.load import refuse_broken
from soar_mega.distributed import start_world
from soar_mega.engines.kept_weights import sharded_copy, sharded_main_copies
from soar_mega.engines.on_demand import without_room
from soar_mega.models.common.build import build_model
from soar_mega.models.common.fingerprint import fingerprint
from soar_mega.models.common.lora import Adapters, add_adapters, alpha, is_adapter
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import read_sizes

ADAPTERS = (
    "_lora"  # beside the sizes of a transformer in checkpoint.json, whose readers skip what begins with _
)


def describe(config: LoraConfig, base: str) -> Json:
    """What a checkpoint says of its adapters; resuming compares it.

    Args:
        base: the fingerprint of the weights that they are trained on.
    """
    return {"rank": config.rank, "alpha": alpha(config), "targets": config.targets, "base": base}


def checkpoint_to_adapters(source: str | Path, out: str | Path, ema: bool = False) -> None:
    """Writes the adapters of a checkpoint in PEFT's and in diffusers' format; the layout does not matter.

    Args:
        source: an iter_ folder, or a run folder, whose latest checkpoint is taken.
        ema: the EMA of the adapters.

    Raises:
        ValueError: no checkpoint, none of adapters, one without EMA, or one that cannot be read; or `out` holds what
            this program did not write, or what is read lies in it or around it.
    """
    folder = resume.find_checkpoint(source)
    check_place(out, folder)
    start_world(ParallelConfig())
    description = resume.verified(folder, ema)
    if ADAPTERS not in description["model"]:
        raise ValueError(
            f"{folder} is of a run that trained the weights themselves: give another form with --to"
        )
    settings = model_settings(folder)
    dtype = ModelConfig(dtype=settings.get("dtype", "fp32"))
    model = build_model(read_sizes(description["model"]), dtype, ParallelConfig(), meta=True)
    config = _config(description)
    adapters = add_adapters([model], config, seed=0)
    tensors = _read(folder, model, ema)
    save_adapters(model, adapters, config, out, tensors.__getitem__, settings.get("pipeline_dir", ""))


def adapted_model(
    folder: Path, description: Json, settings: dict[str, Any], ema: bool, exact: bool = False
) -> tuple[Transformer, Callable[[str], Tensor]]:
    """The model that a checkpoint's adapters were trained on, and its tensors with them by name.

    Args:
        description: of the checkpoint, which has been verified.
        settings: the model group of the run.
        exact: the adapters in float32 as the optimizer has them, and their base as its folder has it.

    Raises:
        ValueError: the base is not there, or has other weights than those that were trained on.
    """
    model, adapters, tensors = _on_base(folder, description, settings, ema, exact)
    own = named_tensors(load_diffusers(settings["pipeline_dir"]) if exact else model)
    return model, adapters.merged(lambda name: tensors[name] if name in tensors else own[name])


def holds_adapters(folder: Path) -> bool:
    """Whether a checkpoint is of a run that trained adapters."""
    return ADAPTERS in resume.read_description(folder)["model"]


@torch.no_grad()
def load_adapted_checkpoint(folder: Path, dtype: str, ema: bool = False) -> Transformer:
    """A checkpoint's adapters on the model that they were trained on, ready to predict in one process. Collective.

    Raises what `resume.verified` and `adapted_model` do.
    """
    start_world(ParallelConfig())
    description, settings = resume.verified(folder, ema), model_settings(folder)
    model, _, tensors = _on_base(folder, description, settings, ema)
    if dtype != settings["dtype"]:
        model = load_diffusers(settings["pipeline_dir"], dtype)
        add_adapters([model], _config(description), seed=0)
    own = named_tensors(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model


def _on_base(
    folder: Path, description: Json, settings: dict[str, Any], ema: bool, exact: bool = False
) -> tuple[Transformer, Adapters, dict[str, Tensor]]:
    """The base with new adapters on it, and what the checkpoint holds of them; raises what `adapted_model` does."""
    base = settings.get("pipeline_dir")
    if not base or settings.get("init") != "pretrained":
        raise ValueError(
            f"{folder} holds adapters alone, and their base is no pipeline folder: write them with --to adapters"
        )
    model = load_diffusers(base, settings["dtype"])
    known, found = description["model"][ADAPTERS]["base"], fingerprint(model)
    if found != known:
        raise ValueError(
            f"{base} does not hold the weights that the adapters in {folder} were trained on (their fingerprint is "
            f"{known}, that of the folder {found}): put these back, or write the adapters alone with --to adapters"
        )
    adapters: Adapters = add_adapters([model], _config(description), seed=0)
    return model, adapters, _read(folder, model, ema, exact)


@torch.no_grad()
def _read(folder: Path, model: Transformer, ema: bool, exact: bool = False) -> dict[str, Tensor]:
    """The adapters of a checkpoint in the model's type, or exact."""
    state = {name: tensor for name, tensor in model.sharded_state_dict().items() if is_adapter(name)}
    if ema:
        state = sharded_copy(state, "ema", without_room)
    elif exact:
        state |= sharded_main_copies(state, held_names(folder))
    for tensor in state.values():
        tensor.data = torch.empty(tensor.local_shape, dtype=tensor.dtype)
    found = read_tensors(folder, {"adapters": state})["adapters"]
    refuse_broken([name for name, tensor in found.items() if not is_finite(tensor)], folder)
    dtype = torch.float32 if exact else model.config.params_dtype
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def _config(description: Json) -> LoraConfig:
    known = description["model"][ADAPTERS]
    return LoraConfig(rank=known["rank"], alpha=known["alpha"], targets=known["targets"])
