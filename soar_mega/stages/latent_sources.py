"""The tensors behind the rows of a micro-batch, and the two things that are made of them: states and losses.

Fused, both are one call of a kernel (`soar_mega.kernels`), and neither the noise nor a target is ever stored. Not
fused, they are the plain torch calls that say what the kernels must compute.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from soar_mega.flow import SOURCES
from soar_mega.kernels import STREAMS, PointTable, losses_of, states_of, to_tokens
from soar_mega.kernels.point_tables import combined

DRAWN = tuple(name in STREAMS for name in SOURCES)  # of the six sources, whether it is drawn


@dataclass(kw_only=True)
class Sources:
    """Six sources of M points, three of them drawn, and the tables that say what each point takes of them."""

    z0: Tensor  # [B, C, H, W] float32
    # [A, C, H, W] float32, whose rows are the tables' answers; None where no row reads it
    v_uncond: Tensor | None
    v_cond: Tensor | None
    states: PointTable | None  # None where no states are made
    targets: PointTable | None
    fused: bool

    def combine(
        self, table: PointTable, dtype: torch.dtype = torch.float32, patch_size: int | None = None
    ) -> Tensor:
        """The states or targets of a table: [M, C, H, W] of `dtype`, or cut into patches [M, H W / p^2, C p p]."""
        if self.fused:
            return states_of(self._given(), table, dtype, patch_size)
        made = combined(table.read(self._given()), table).to(dtype)
        return made if patch_size is None else to_tokens(made, patch_size)

    def squared_error(self, velocity: Tensor, table: PointTable) -> Tensor:
        """Mean squared error of velocity [M, C, H, W] against the targets of a table: [M] float32."""
        if self.fused:
            return losses_of(velocity.contiguous(), self._given(), table)
        return (velocity.float() - self.combine(table)).square().flatten(1).mean(dim=1)

    def _given(self) -> tuple[Tensor | None, ...]:
        return self.z0, None, self.v_uncond, self.v_cond, None, None
