"""What a stage hands to an engine: queries to answer and points to train on, as rows over the six sources.

A state and a target are rows of six float64 coefficients over z0, z1, v_uncond, v_cond, eps and z1_aux
(`soar_mega.flow.rows`). Rows cost nothing, so a stage makes them for its rank's whole batch; tensors of latent
size exist only for the micro-batch that an engine is working on. Rows and positions stay on the CPU; sources are
where latents are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import Schedule
from soar_mega.stages.latent_sources import Sources


class RolloutStep(NamedTuple):
    """A further step of the rollouts of Q queries: their velocities at the states that the steps before have led to."""

    timestep: Tensor  # [Q] float64
    rows: Tensor  # [Q, 6] float64, which read the mean velocity of the way so far
    share: Tensor  # [Q] float64, of this step's velocity in the mean of the way behind it


@dataclass(kw_only=True)
class Queries:
    """States whose velocity must be known before points are trained on, at any places of a batch."""

    sample: Tensor  # [Q] int64, index into the batch
    path: Tensor  # [Q] int64: keys eps and z1_aux
    timestep: Tensor  # [Q] float64, what the model is told
    rows: Tensor  # [Q, 6] float64; velocities have no coefficients
    then: tuple[RolloutStep, ...] = ()  # whose mean velocity is the answer, where there are any
    dropped: Tensor  # [Q] bool: the conditional branch sees the empty prompt
    # whether v_uncond is wanted (a guidance scale of 1 does not need it), or [Q] bool
    unconditional: bool | Tensor
    fused: bool = True  # states by a kernel

    def __len__(self) -> int:
        return len(self.sample)


class Velocities(NamedTuple):
    """What was answered at M points, each [M, C, H, W] float32."""

    uncond: Tensor | None  # None where it was not asked for
    cond: Tensor


@dataclass(kw_only=True)
class Points:
    """Training points of a batch: `count` says how much each adds to the normaliser, `weight` to the loss.

    Attributes:
        kinds: the stage's, the same on all ranks.
        measured: what is logged in quantiles over the points that are present: "k" as k/q05, k/q50 and k/q95.
        reads: which query of a further answer a point's loss reads, by the answer's name in `Engine.learn`.
        guidance_scale: the loss gets v_uncond + scale (v_cond - v_uncond) of two branches in one forward; None or 1:
            v_cond alone.
        detach_unconditional: then v_uncond gets no gradient.
        answered: what `reads` was answered, by the same name; filled by the engine for one micro-batch.
        observed: [M] each, detached: what the loss tells of its points, by the names of `Stage.observes`.
    """

    kinds: tuple[str, ...]
    sample: Tensor  # [P] int64, index into the batch
    path: Tensor  # [P] int64, rollout path: keys eps and z1_aux
    kind: Tensor  # [P] int64, index into `kinds`
    query: Tensor  # [P] int64, whose velocities the rows read
    sigma: Tensor  # [P] float64
    timestep: Tensor  # [P] float64, what the model is told
    state_rows: Tensor  # [P, 6] float64
    target_rows: Tensor  # [P, 6] float64
    dropped: Tensor  # [P] bool: trained on the empty prompt
    weight: Tensor  # [P] float64: w(s) at base points, lambda w(s') at auxiliary ones, 0 where absent
    count: Tensor  # [P] float64: 1 at base points, lambda at auxiliary ones, 0 where absent
    measured: dict[str, Tensor] = field(default_factory=dict)  # [P] float64, NaN at points that have none
    extra: dict[str, Tensor] = field(default_factory=dict)  # [P, ...] tensors that only the loss reads
    reads: dict[str, Tensor] = field(default_factory=dict)  # [P] int64
    guidance_scale: float | None = None
    detach_unconditional: bool = False
    fused: bool = True  # states and losses by kernels
    sources: Sources | None = None  # filled by the engine for one micro-batch
    answered: dict[str, Velocities] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)

    @property
    def branches(self) -> int:
        """Rows of a forward for each point."""
        return 1 if self.guidance_scale in (None, 1.0) else 2

    def __len__(self) -> int:
        return len(self.sample)

    def of_kind(self, name: str) -> Tensor:
        """[P] bool: which points are of a kind."""
        return self.kind == self.kinds.index(name)

    def take(self, index: Tensor | slice) -> "Points":
        """The points at `index` [M] int64, or views of a slice; what the engine fills in is left behind."""
        taken: dict[str, Any] = {name: getattr(self, name)[index] for name in PER_POINT}
        for name in ("measured", "extra", "reads"):
            taken[name] = {key: value[index] for key, value in getattr(self, name).items()}
        return replace(self, **taken, sources=None, answered={}, observed={})

    def asked(self, unconditional: bool) -> Queries:
        """Their states as queries, one for each."""
        return Queries(
            sample=self.sample,
            path=self.path,
            timestep=self.timestep,
            rows=self.state_rows,
            dropped=self.dropped,
            unconditional=unconditional,
            fused=self.fused,
        )

    def states(self, dtype: torch.dtype = torch.float32, patch_size: int | None = None) -> Tensor:
        """States [M, C, H, W], or patches [M, H W / p^2, C p p], from the sources of this micro-batch."""
        assert self.sources is not None and self.sources.states is not None
        return self.sources.combine(self.sources.states, dtype, patch_size)

    def targets(self) -> Tensor:
        """Target velocities [M, C, H, W] float32, from the sources of this micro-batch."""
        assert self.sources is not None and self.sources.targets is not None
        return self.sources.combine(self.sources.targets)


PER_POINT = [f.name for f in fields(Points) if f.type is Tensor]


class Further(NamedTuple):
    """An answer that only a loss reads; `Points.reads` says which of its queries is a point's."""

    weights: str  # that answer: current, or a name of `Stage.keeps`
    queries: Callable[[Batch], Queries]


class Stage(Protocol):
    """One training method: three pure functions that know nothing of parallelism, devices or optimizers."""

    kinds: tuple[str, ...]  # of its points; steps are compared by the loss of the first
    schedule: Schedule
    answer_weights: str  # which weights answer the queries: current, or a name given to Engine.keep_weights
    further: Mapping[str, Further]  # what its loss reads beside that answer, by name
    keeps: tuple[str, ...]  # the copies of the weights that it wants kept, from the first step on
    # names of what its loss puts into `Points.observed`: averages of a step's statistics
    observes: tuple[str, ...]

    def queries(self, batch: Batch) -> Queries | None: ...

    def points(self, batch: Batch) -> Points: ...

    def loss(self, points: Points, velocity: Tensor) -> Tensor: ...

    def blends(self, iteration: int, is_collection_over: bool) -> Mapping[str, float]:
        """After so many steps: the kept copies that are moved toward the weights, each with its decay.

        Args:
            is_collection_over: all that was collected has been learned from.
        """
        ...


def squared_error(points: Points, velocity: Tensor) -> Tensor:
    """Mean squared error of the velocity [M, C, H, W] against the targets, per point: [M] float32."""
    assert points.sources is not None and points.sources.targets is not None
    return points.sources.squared_error(velocity, points.sources.targets)


def concatenate(parts: list[Points]) -> Points:
    """Points of several kinds as one list, for what all of them have."""
    assert not any(part.measured or part.extra or part.reads or part.guidance_scale for part in parts)
    columns: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in PER_POINT}
    return Points(kinds=parts[0].kinds, **columns, fused=parts[0].fused)
