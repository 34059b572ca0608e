"""From an image to what a vision model reads, in the ways that the published scripts have."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from soar_mega.evaluation.pictures import from_pil

# of every CLIP, and of ImageReward's BLIP
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def in_range(image: Tensor) -> Tensor:
    """An image [3, H, W] on the CPU in float32.

    Raises:
        ValueError: it is not an image of three channels in [0, 1].
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"an image must be [3, H, W], not {list(image.shape)}")
    low, high = image.min().item(), image.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"an image must be in [0, 1], not from {low:.4g} to {high:.4g}; clamp it")
    return image.to("cpu", torch.float32)


def normalized(image: Tensor) -> Tensor:
    """[3, H, W] -> [1, 3, H, W] with CLIP's mean and standard deviation taken out."""
    return ((image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


def shortest_edge(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of an image whose shorter edge becomes `size`."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def by_pil(image: Image.Image, size: int, rounded_crop: bool = False) -> Tensor:
    """Shorter edge to `size` by PIL's bicubic filter on 8 bits, middle square, normalised: [1, 3, size, size].

    Args:
        rounded_crop: an odd margin is halved to the nearest even number, as torchvision does, not down, as transformers
            does.
    """
    width, height = shortest_edge(*image.size, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    margins = (width - size) / 2, (height - size) / 2
    left, top = (round(margin) if rounded_crop else int(margin) for margin in margins)
    return normalized(from_pil(image.crop((left, top, left + size, top + size))))


def by_bilinear_tensor(image: Tensor, size: int) -> Tensor:
    """Shorter edge to `size` by torch's antialiased bilinear filter, middle square, normalised: [1, 3, size, size]."""
    width, height = shortest_edge(image.shape[2], image.shape[1], size)
    smaller = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    left, top = round((width - size) / 2), round((height - size) / 2)
    return normalized(smaller[:, top : top + size, left : left + size])


def by_padded_tensor(image: Tensor, size: int) -> Tensor:
    """Longer edge to `size` by torch's antialiased bicubic filter, black margins, normalised: [1, 3, size, size]."""
    scale = size / max(image.shape[1:])
    if scale != 1:
        height, width = (round(edge * scale) for edge in image.shape[1:])
        image = interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
        below, right = size - height, size - width
        image = pad(image, (right // 2, right - right // 2, below // 2, below - below // 2))
    return normalized(image)
