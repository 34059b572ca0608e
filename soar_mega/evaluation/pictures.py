"""Images as tensors in [0, 1] and as PIL has them, in 8 bits."""

import torch
from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """Of an image [3, H, W] on the CPU, rounded to 8 bits, as a PNG file holds it; what is beyond [0, 1] is cut off."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
