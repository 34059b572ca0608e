"""The tensors behind the rows of a micro-batch, and the two things that are made of them: states and losses.

Fused, both are one call of a kernel (`soar_mega.kernels`), and neither the noise nor a target is ever stored. Not
fused, they are the plain torch calls that say what the kernels must compute.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soar_mega.flow import combine, normal
from soar_mega.kernels import STREAMS, correction_loss, rollout_renoise, to_tokens


@dataclass(kw_only=True)
class Sources:
    """Six sources of M points: S samples' latents and velocities, and what keys their noise."""

    seed: int
    position: Tensor  # [S] int64
    z0: Tensor  # [S, C, H, W] float32
    v_uncond: Tensor | None  # [S, C, H, W], None where no row reads it
    v_cond: Tensor | None
    sample: Tensor  # [M] int64, which of the S samples a point reads
    path: Tensor  # [M] int64, rollout path: keys eps and z1_aux
    fused: bool

    def combine(
        self, rows: Tensor, dtype: torch.dtype = torch.float32, patch_size: int | None = None
    ) -> Tensor:
        """The states or targets of rows [M, 6]: [M, C, H, W] of `dtype`, or cut into patches [M, H W / p^2, C p p]."""
        if not self.fused:
            combined = combine(rows, self.materialised(rows)).to(dtype)
            return combined if patch_size is None else to_tokens(combined, patch_size)
        sources = (self.z0, None, self.v_uncond, self.v_cond)
        return rollout_renoise(*sources, rows, dtype=dtype, patch_size=patch_size, **self._keys())

    def squared_error(self, velocity: Tensor, rows: Tensor) -> Tensor:
        """Mean squared error of velocity [M, C, H, W] against the targets of rows [M, 6]: [M] float32."""
        if not self.fused:
            return (velocity.float() - self.combine(rows)).square().flatten(1).mean(dim=1)
        return correction_loss(
            velocity.contiguous(), self.z0, None, self.v_uncond, self.v_cond, rows, **self._keys()
        )

    def _keys(self) -> dict[str, Any]:
        return {
            "sample": self.sample,
            "path": self.path,
            "draw": tuple(STREAMS),
            "seed": self.seed,
            "position": self.position,
        }

    def materialised(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """The six sources, each [M, C, H, W], or None where no row reads it."""
        used = rows.ne(0).any(dim=0).tolist()
        position = self.position[self.sample]

        def noise(name: str, path: Tensor | int) -> Tensor:
            return normal(self.seed, STREAMS[name], position, path, self.z0.shape[1:], self.z0.device)

        return (
            self.z0[self.sample] if used[0] else None,
            noise("z1", 0) if used[1] else None,
            self.v_uncond[self.sample] if used[2] and self.v_uncond is not None else None,
            self.v_cond[self.sample] if used[3] and self.v_cond is not None else None,
            noise("eps", self.path) if used[4] else None,
            noise("z1_aux", self.path) if used[5] else None,
        )
