"""Whether all numbers of a tensor are numbers."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; needs no memory."""
    # NaN is both the smallest and the largest of what it stands among
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))
