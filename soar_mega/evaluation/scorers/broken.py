"""Images that are no images: what a model made that diverged, or a decoder that overflowed."""

from torch import Tensor

# Rounded to 8 bits such an image is zero everywhere.
BLACK = 0.5 / 255


def what_is_broken(images: Tensor) -> list[str]:
    """For each image [N, 3, H, W] in [0, 1]: "NaN" (or infinite), "black", or "" where it can be judged."""
    return [_fault(image) for image in images]


def _fault(image: Tensor) -> str:
    if not image.isfinite().all():
        return "NaN"
    return "black" if image.max() < BLACK else ""
