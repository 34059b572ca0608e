"""Images as files: tensors in [0, 1] to PNG, and back from what a network sent."""

from base64 import b64decode, b64encode
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from soar_mega.evaluation.pictures import to_pil

FORMATS = ("PNG", "JPEG")  # UniRL's client sends JPEG unless it is asked for PNG


def to_base64(image: Tensor) -> str:
    """The PNG of an image [3, H, W] in [0, 1] as base64."""
    file = BytesIO()
    to_pil(image.cpu()).save(file, format="PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


def from_base64(text: str, most_pixels: int) -> Tensor:
    """[3, H, W] uint8 of a PNG or JPEG as base64. ValueError where it is none, damaged, or has too many pixels."""
    try:
        # the size stands in the head of the file: nothing is decoded that would be too large
        with Image.open(BytesIO(b64decode(text, validate=True)), formats=FORMATS) as file:
            width, height = file.size
            pixels = None if width * height > most_pixels else np.array(file.convert("RGB"))
    except Exception as error:  # on damaged files the library's decoders raise whatever comes to pass
        raise ValueError(f"the image is no PNG or JPEG in base64, or it is damaged: {error}") from error
    if pixels is None:
        raise ValueError(
            f"the image has {width} x {height} pixels, at most {most_pixels} are left in this request"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)
