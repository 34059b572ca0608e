"""Images from files to tensors of a bucket's size."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height


class ImageError(Exception):
    """An image file that cannot be read; says why."""


def read_image(path: Path) -> Image.Image:
    """The whole image, upright, RGB; transparent parts become white. ImageError when the file is damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # on damaged headers the library's decoders raise whatever comes to pass
        raise _unreadable(error) from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the head of the file. ImageError when it is damaged."""
    try:
        with Image.open(path) as file:
            width, height = file.size
            return (height, width) if file.getexif().get(ORIENTATION) in SIDEWAYS else (width, height)
    except Exception as error:  # as above
        raise _unreadable(error) from error


def fit(image: Image.Image, width: int, height: int, mirrored: bool = False) -> Tensor:
    """Resized to cover width x height, the middle cut out: [3, height, width] uint8. An exact fit is not resampled."""
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(2) if mirrored else pixels


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as the VAE takes images."""
    return pixels.float() / 255 * 2 - 1


def _unreadable(error: Exception) -> ImageError:
    own_words = isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError)
    return ImageError(f"cannot be read as an image: {error if own_words else repr(error)}")
