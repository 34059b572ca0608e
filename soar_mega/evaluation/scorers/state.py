"""Weights of a scorer from its file into a model, or a message that says what does not fit."""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from soar_mega.user_files import read_object

Network = TypeVar("Network", bound=nn.Module)
Model = TypeVar("Model", bound=PreTrainedModel)
MAX_LISTED = 4  # of a kind
# What a record of the training beside the weights may consist of; none of it runs code.
_NUMBER: Callable[..., Any] = np.float64().__reduce__()[0]  # type: ignore[assignment]
NUMPY_NUMBERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file where it is missing or damaged."""
    return read_object(path, "copy it again")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a file of torch.save, on the CPU; no code in it is run.

    Raises:
        ValueError: it is truncated or of another kind; names the file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no file of weights, or holds more than numbers and tensors") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); is the copy complete?") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return dict(content)


def fill(network: Network, state: Mapping[str, Tensor], path: Path, device: torch.device) -> Network:
    """A network in float32 with exactly these weights, ready to judge.

    Args:
        path: where the weights are from, for the message.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    wanted = network.state_dict()
    _complain(
        path,
        [name for name in wanted if name not in state],
        [name for name in state if name not in wanted],
        [
            (name, state[name].shape, value.shape)
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    )
    network.load_state_dict(state)
    return network.float().eval().requires_grad_(False).to(device)


def fill_model(
    cls: type[Model],
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    path: Path,
    device: torch.device,
    unneeded: tuple[str, ...] = (),
    **arguments: Any,
) -> Model:
    """The same for a model of transformers, with weights under the names of its published checkpoints.

    Those names are stable; the names of its modules are not, and transformers knows how they changed.

    Args:
        unneeded: beginnings of names that may be missing.
        arguments: of the model beside `config`.
    """
    with _quiet():
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
    missing = [name for name in report["missing_keys"] if not name.startswith(unneeded)]
    _complain(path, missing, report["unexpected_keys"], report["mismatched_keys"])
    return model.eval().requires_grad_(False).to(device)


def _complain(
    path: Path,
    missing: Iterable[str],
    unknown: Iterable[str],
    misshaped: Iterable[tuple[str, torch.Size, torch.Size]],
) -> None:
    kinds = (
        [f"missing: {name}" for name in sorted(missing)],
        [f"unknown: {name}" for name in sorted(unknown)],
        [
            f"shape of {name} is {tuple(found)}, not {tuple(wanted)}"
            for name, found, wanted in sorted(misshaped)
        ],
    )
    lines = []
    for problems in kinds:
        lines += problems[:MAX_LISTED]
        if len(problems) > MAX_LISTED:
            lines.append(f"and {len(problems) - MAX_LISTED} more like that")
    if lines:
        listing = "\n  ".join(lines)
        raise ValueError(f"the weights in {path} are of another architecture:\n  {listing}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report of transformers beside ours."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
