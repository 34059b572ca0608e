"""What the host has made, on its way to a device: nobody waits for it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; of each part, as kernels like their pointers


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on `device`, as parts of one buffer that went there in one transfer.

    The buffer on the host is pinned where the device is a GPU; torch keeps it until the transfer is over.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + math.ceil(size / ALIGNMENT) * ALIGNMENT)
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")

    def parts(buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            for start, size, tensor in zip(starts, sizes, tensors, strict=False)
        ]

    for part, tensor in zip(parts(staging), tensors, strict=True):
        part.copy_(tensor)
    return parts(staging.to(device, non_blocking=True))


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; one of the CPU goes to a GPU from pinned memory, and nobody waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
