"""The control arm of SOAR: its draws, its auxiliary sigmas and its normalisation, with every state on the ideal ray.

The rollout is then the only difference between the two arms.
"""

from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import base_rows
from soar_mega.stages.points import Queries
from soar_mega.stages.soar import Soar


class SftMulti(Soar):
    """Flow matching on several sigmas per sample."""

    def queries(self, batch: Batch) -> Queries | None:
        return None

    def _rows(self, sigma0: Tensor, sigma1: Tensor, sigma: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        return base_rows(sigma)
