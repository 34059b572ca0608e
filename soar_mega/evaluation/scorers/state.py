"""Weights of a scorer from its file into a model, or a message that says what does not fit."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
MAX_LISTED = 10


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a file of torch.save, on the CPU; no code in it is run.

    Raises:
        ValueError: it is truncated or of another kind; names the file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); is the copy complete?") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return dict(content)


def fill(make: Callable[[], Model], state: Mapping[str, Tensor], path: Path, device: torch.device) -> Model:
    """A model in float32 with exactly these weights, ready to judge.

    Args:
        make: makes the model; its parameters need no values.
        path: where the weights are from, for the message.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape: the weights are of another architecture.
    """
    with init_empty_weights():
        model = make()
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in state]
    problems += [
        f"unknown: {name} {tuple(value.shape)}" for name, value in state.items() if name not in wanted
    ]
    problems += [
        f"shape of {name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        listing = "\n  ".join(problems[:MAX_LISTED]) + more
        raise ValueError(f"the weights in {path} are of another architecture:\n  {listing}")
    model.load_state_dict({name: _plain(value) for name, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False).to(device)


def _plain(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
