"""What a stage hands to an engine: queries to answer and points to train on, as rows over the six sources.

A state and a target are rows of six float64 coefficients over z0, z1, v_uncond, v_cond, eps and z1_aux
(`soar_mega.flow.rows`). Rows cost nothing, so a stage makes them for its rank's whole batch; tensors of latent
size exist only for the micro-batch that an engine is working on. Rows and positions stay on the CPU; sources are
where latents are.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.stages.latent_sources import Sources


@dataclass(kw_only=True)
class Queries:
    """States whose guided velocity must be known before the points can be built: one per sample of the batch."""

    sigma: Tensor  # [B] float64
    timestep: Tensor  # [B] float64, what the model is told
    rows: Tensor  # [B, 6] float64; only z0 and z1 may have coefficients
    dropped: Tensor  # [B] bool: the conditional branch sees the empty prompt
    unconditional: bool  # whether v_uncond is wanted (a guidance scale of 1 does not need it)
    fused: bool = True  # states by a kernel


@dataclass(kw_only=True)
class Points:
    """Training points of a batch: `count` says how much each adds to the normaliser, `weight` to the loss."""

    sample: Tensor  # [P] int64, index into the batch
    path: Tensor  # [P] int64, rollout path: keys eps and z1_aux
    sigma: Tensor  # [P] float64
    timestep: Tensor  # [P] float64, what the model is told
    state_rows: Tensor  # [P, 6] float64
    target_rows: Tensor  # [P, 6] float64
    dropped: Tensor  # [P] bool: trained on the empty prompt
    weight: Tensor  # [P] float64: w(s) at base points, lambda w(s') at auxiliary ones, 0 where absent
    count: Tensor  # [P] float64: 1 at base points, lambda at auxiliary ones, 0 where absent
    auxiliary: Tensor  # [P] bool
    strength: Tensor  # [P] float64: k of the correction, 0 at base points
    extra: dict[str, Tensor] = field(default_factory=dict)  # [P, ...] tensors that only the loss reads
    fused: bool = True  # states and losses by kernels
    sources: Sources | None = None  # filled by the engine for one micro-batch

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, index: Tensor | slice) -> "Points":
        """The points at `index` [M] int64, or views of a slice of them; sources are not carried over."""
        taken = {name: getattr(self, name)[index] for name in PER_POINT}
        return replace(self, **taken, extra={k: v[index] for k, v in self.extra.items()}, sources=None)

    def states(self, dtype: torch.dtype = torch.float32, patch_size: int | None = None) -> Tensor:
        """States [M, C, H, W], or patches [M, H W / p^2, C p p], from the sources of this micro-batch."""
        assert self.sources is not None and self.sources.states is not None
        return self.sources.combine(self.sources.states, dtype, patch_size)

    def targets(self) -> Tensor:
        """Target velocities [M, C, H, W] float32, from the sources of this micro-batch."""
        assert self.sources is not None and self.sources.targets is not None
        return self.sources.combine(self.sources.targets)


PER_POINT = [f.name for f in fields(Points) if f.name not in ("extra", "fused", "sources")]


class Stage(Protocol):
    """One training method: three pure functions that know nothing of parallelism, devices or optimizers."""

    answer_weights: str  # which weights answer the queries: current | ema | reference | old

    def queries(self, batch: Batch) -> Queries | None: ...

    def points(self, batch: Batch) -> Points: ...

    def loss(self, points: Points, velocity: Tensor) -> Tensor: ...


def squared_error(points: Points, velocity: Tensor) -> Tensor:
    """Mean squared error of the velocity [M, C, H, W] against the targets, per point: [M] float32."""
    assert points.sources is not None and points.sources.targets is not None
    return points.sources.squared_error(velocity, points.sources.targets)


def concatenate(parts: list[Points]) -> Points:
    """Points of several kinds as one list."""
    columns: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in PER_POINT}
    return Points(**columns, fused=parts[0].fused)
