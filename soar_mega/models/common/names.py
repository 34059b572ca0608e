"""Parameter names that do not depend on the layout."""

import torch
from torch import Tensor


def global_parameter_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under their global names, from a Transformer or a wrapper (DDP) around one."""
    return {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}


def named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """This rank's parameters and buffers by name; state_dict() would add megatron's empty _extra_state entries."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
