"""TensorBoard events of a run: <run folder>/tensorboard, written by rank 0."""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Events:
    """Writes scalars and images; does nothing where there is no folder (other ranks, logging.tensorboard: false).

    Args:
        folder: the run folder, or None.
        iteration: of the last events that stay; those beyond it, of a run that was killed after its last checkpoint,
            are hidden.
    """

    def __init__(self, folder: Path | None, iteration: int) -> None:
        self._writer: SummaryWriter | None = None
        if folder is not None:
            from torch.utils import tensorboard  # slow to import, and only rank 0 needs it

            self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """One point on each of the named curves."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def histogram(self, name: str, values: Tensor, iteration: int) -> None:
        """How values of any shape are spread; what is not finite is left out."""
        finite = values[values.isfinite()]
        if self._writer is not None and len(finite):
            self._writer.add_histogram(name, finite, iteration)

    def image(self, name: str, image: Tensor, iteration: int) -> None:
        """An image [3, H, W] in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, image, iteration)

    def flush(self) -> None:
        """Hands everything to the file, for instance with each checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: what torch's allocator has taken of the GPU, or resident on the CPU.

    What it has given out leaves out the memory of CUDA graphs, to which every replay writes.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
