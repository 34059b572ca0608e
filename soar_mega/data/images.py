"""Images from files to tensors of a bucket's size."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

# Text in a PNG, such as the workflow that made it, is not used: it may be as long as Pillow allows for all of them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height


class ImageError(Exception):
    """An image file that cannot be read; says why."""


@dataclass(frozen=True)
class Picture:
    """Where the bytes of an image are: a file, or a part of one, such as of a tar."""

    path: Path
    offset: int = 0
    size: int | None = None  # bytes; None: to the end of the file

    def open(self) -> BinaryIO:
        """The bytes as a file. ImageError when they cannot be read."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 closed by the caller
            if self.size is None:
                return file
            with file:
                file.seek(self.offset)
                return BytesIO(file.read(self.size))
        except OSError as error:
            raise ImageError(f"{self.path} cannot be read: {error.strerror}") from error


def read_image(source: Path | BinaryIO) -> Image.Image:
    """The whole image, upright, RGB; transparent parts become white. ImageError when the file is damaged."""
    try:
        with Image.open(source) as file:
            _refuse_several_pictures(file)
            image = _in_8_bits(ImageOps.exif_transpose(file))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # on damaged headers the library's decoders raise whatever comes to pass
        raise _unreadable(error) from error


def image_size(source: Path | BinaryIO) -> tuple[int, int]:
    """(width, height) of the upright image, from the head of the file. ImageError when it is damaged."""
    try:
        with Image.open(source) as file:
            _refuse_several_pictures(file)
            width, height = file.size
            return (height, width) if file.getexif().get(ORIENTATION) in SIDEWAYS else (width, height)
    except Exception as error:  # as above
        raise _unreadable(error) from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, which Pillow's `convert` would cut off at 255: white. In colour it reads 8 itself."""
    if not image.mode.startswith("I"):
        return image
    values = np.array(image).clip(0, 2**16 - 1).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def _refuse_several_pictures(file: Image.Image) -> None:
    # MPO is what phones and cameras write as .jpg: a photograph, with a preview or a gain map behind it
    count = getattr(file, "n_frames", 1)
    if count > 1 and file.format != "MPO":
        raise ImageError(f"is animated or has pages: save the one of its {count} pictures that is meant")


def fit(image: Image.Image, width: int, height: int, mirrored: bool = False) -> Tensor:
    """The middle of the image, resized to width x height: [3, height, width] uint8. An exact fit is not resampled."""
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        cut = (min(image.width, width / scale), min(image.height, height / scale))
        left, top = (image.width - cut[0]) / 2, (image.height - cut[1]) / 2
        # cut while it is resampled: all of a long, thin picture would be as much longer than the bucket
        box = (left, top, left + cut[0], top + cut[1])
        image = image.resize((width, height), Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(2) if mirrored else pixels


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as the VAE takes images."""
    return pixels.float() / 255 * 2 - 1


def _unreadable(error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory
        return ImageError("cannot be read as an image: its bytes are of no kind that is known")
    own_words = isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError)
    return ImageError(f"cannot be read as an image: {error if own_words else repr(error)}")
