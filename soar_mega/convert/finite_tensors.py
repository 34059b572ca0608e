"""Whether all numbers of a tensor are numbers."""

import torch
from torch import Tensor

BLOCK = 2**22  # elements that are looked at together: what is made of them takes memory too


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; needs little memory."""
    return all(bool(block.isfinite().all()) for block in torch.atleast_1d(tensor).reshape(-1).split(BLOCK))
