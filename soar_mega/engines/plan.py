"""What the micro-batches of a pass read: made once, on the CPU, and sent to the device in one transfer.

A micro-batch is a view of it. Every decision is one about the draws, so the host never looks at what a device holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.distributed import device
from soar_mega.engines.branches import Branches
from soar_mega.engines.channel import Answers
from soar_mega.kernels import PointTable
from soar_mega.kernels.point_tables import group_table, point_table, uses
from soar_mega.models.common.conditions import Conditions
from soar_mega.stages.latent_sources import DRAWN, Sources
from soar_mega.stages.points import Points, Queries, Velocities
from soar_mega.upload import pinned, upload

ANSWER_COLUMNS = slice(2, 4)  # v_uncond and v_cond among the six sources


@dataclass(frozen=True, kw_only=True)
class PlacedBatch:
    """A batch with positions, validity and prompts' rows on the CPU, and its tensors on the device.

    Attributes:
        given: the batch as it came.
        batch: its latents are zero where a sample could not be read.
        conditions: one of each prompt as the model reads it, the empty prompt last; None where the model does not
            begin.
    """

    given: Batch
    batch: Batch
    conditions: Conditions | None

    def conditions_at(self, row: Tensor) -> Conditions:
        """The conditions at the rows `row` [M] int64, on the device."""
        assert self.conditions is not None
        return self.conditions.rows(row)

    def condition_rows(self, sample: Tensor, dropped: Tensor) -> Tensor:
        """[M] int64: where the conditions of samples are, the empty prompt where `dropped` [M]."""
        batch = self.batch
        assert batch.text is not None
        prompt = sample if batch.prompt is None else batch.prompt[sample]
        return torch.where(dropped, len(batch.text), prompt)


def place(batch: Batch, dtype: torch.dtype, guidance_scale: float | None = None) -> PlacedBatch:
    """The batch for a model of `dtype`, which is told a guidance scale if there is one."""
    given = batch
    prompt = None if batch.prompt is None else batch.prompt.cpu()
    batch = replace(batch, position=batch.position.cpu(), valid=batch.valid.cpu(), prompt=prompt)
    if batch.latents is not None:
        latents = pinned(batch.latents, device())
        if not bool(batch.valid.all()):
            latents = latents.clone()
            for row in (~batch.valid).nonzero().flatten().tolist():
                latents[row].zero_()  # weight zero times a latent that is not a number would still be one
        batch = replace(batch, latents=latents)
    conditions = None
    if batch.text is not None:
        assert batch.pooled is not None and batch.empty_text is not None and batch.empty_pooled is not None
        text = _with_last(batch.text, batch.empty_text, dtype)
        conditions = Conditions(text, _with_last(batch.pooled, batch.empty_pooled, dtype))
        if guidance_scale is not None:
            conditions = conditions.told(guidance_scale)
    return PlacedBatch(given=given, batch=batch, conditions=conditions)


def _with_last(rows: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([pinned(part, device()).to(dtype) for part in (rows, last[None])])


@dataclass(frozen=True, kw_only=True)
class QueryPiece:
    """The rows of one forward: queries, with their conditions or without."""

    table: PointTable
    timestep: Tensor  # [rows] float32
    condition: Tensor  # [rows] int64, of PlacedBatch


def query_pieces(
    placed: PlacedBatch, queries: Queries, branches: Branches, answers: Answers | None, group: int
) -> list[QueryPiece]:
    """The forwards of an answer pass, in a multiple of `group`, for the first pipeline rank.

    Args:
        answers: what the queries' rows read.
    """
    batch, rows = placed.batch, branches.rows
    forward = filled(branches.count, 1, group).clamp(max=branches.count - 1)
    query = branches.query[forward].flatten()
    dropped = queries.dropped[query] | branches.unconditional[forward].flatten()
    sample, row = queries.sample[query], torch.zeros_like(query) if answers is None else branches.row[query]
    groups, of_point, begins = group_table(
        sample, queries.path[query], row, batch.position[sample], batch.seed, rows
    )
    made = [
        groups,
        point_table(queries.rows[query], of_point),
        queries.timestep[query].float(),
        placed.condition_rows(sample, dropped),
    ]
    groups, points, timestep, condition = upload(made, device())
    tables = _tables(groups, begins, points, queries.rows[query], batch.seed, rows)
    pieces = zip(tables, timestep.split(rows), condition.split(rows), strict=True)
    return [QueryPiece(table=t, timestep=time, condition=row) for t, time, row in pieces]


@dataclass(frozen=True, kw_only=True)
class PointPiece:
    """One micro-batch of points. What a pipeline stage does not read is None."""

    points: Points  # on the CPU, but for what a loss reads
    answers: "Reading | None"  # of its rows
    others: dict[str, "Reading"]  # of its loss, by name; on the last stage
    states: PointTable | None = None  # on the first stage
    timestep: Tensor | None = None  # [rows] float32: of the points, then of their unconditional branch
    condition: Tensor | None = None  # [rows] int64, of PlacedBatch
    targets: PointTable | None = None  # on the last stage
    weight: Tensor | None = None  # [M] float64

    def with_sources(self, placed: PlacedBatch) -> Points:
        """The points with their sources: the first pipeline rank makes states of them, the last one losses.

        Waits for the answers that they read, and closes them behind the last points.
        """
        assert placed.batch.latents is not None
        v_uncond, v_cond = (None, None) if self.answers is None else self.answers.velocities()
        sources = Sources(
            z0=placed.batch.latents,
            v_uncond=v_uncond,
            v_cond=v_cond,
            states=self.states,
            targets=self.targets,
            fused=self.points.fused,
        )
        answered = {name: reading.at_points() for name, reading in self.others.items()}
        return replace(self.points, sources=sources, answered=answered, observed={})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the points of one micro-batch read of a pass's answers."""

    answers: Answers
    wanted: list[int]  # micro-batches of queries
    rows: Tensor | None  # [M] int64 on the device, for what a loss reads
    is_last: bool  # no points come behind these

    def velocities(self) -> tuple[Tensor | None, Tensor | None]:
        """(v_uncond, v_cond) of all queries, when the wanted ones have arrived."""
        found = self.answers.velocities(self.wanted)
        if self.is_last:
            self.answers.close()
        return found

    def at_points(self) -> Velocities:
        """Those that belong to the points."""
        assert self.rows is not None
        uncond, cond = self.velocities()
        assert cond is not None
        return Velocities(
            uncond=None if uncond is None else uncond.index_select(0, self.rows),
            cond=cond.index_select(0, self.rows),
        )


def readings(
    answers: Answers, query: Tensor, wanted: Tensor, size: int, rows: Tensor | None = None
) -> list[Reading]:
    """By micro-batch of `size` points, what they read: of `query` [P], where `wanted` [P].

    Args:
        rows: [P] int64 on the device, for what a loss reads.
    """
    read = answers.read_by(query.split(size), wanted.split(size))
    parts = [None] * len(read) if rows is None else rows.split(size)
    return [
        Reading(answers=answers, wanted=each, rows=part, is_last=j == len(read) - 1)
        for j, (each, part) in enumerate(zip(read, parts, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class PointPlan:
    """All points of a rank's batch, cut into micro-batches of `size`.

    Attributes:
        points: as they were given, without those that fill up the last micro-batches.
        rows: of a forward: `size`, or twice as many with both branches of guidance.
        total: [1] float64 on the device, the sum of their counts.
        masks: [K, P] bool on the device, the points behind each loss of the statistics; None but on the last stage.
        weight, count: [P] float64 on the device; likewise.
    """

    points: Points
    size: int
    rows: int
    pieces: list[PointPiece]
    total: Tensor
    masks: Tensor | None
    weight: Tensor | None
    count: Tensor | None


def point_plan(
    placed: PlacedBatch,
    points: Points,
    masks: Tensor,
    answers: Answers | None,
    others: Mapping[str, Answers],
    size: int,
    group: int,
    first: bool,
    last: bool,
) -> PointPlan:
    """The learn pass over `points`.

    Args:
        masks: [K, P] bool, see PointPlan.
        answers: what the points' rows read. others: what their loss reads, by name.
        group: micro-batches come in multiples of it.
        first, last: whether this rank has the pipeline's first stage, and its last.
    """
    batch, whole = placed.batch, fill_up(points, size, group)
    sample, needed = whole.sample, needs_answer(whole)
    row = torch.zeros_like(sample) if answers is None else answers.rows_of(whole.query, needed)
    groups, of_point, begins = group_table(sample, whole.path, row, batch.position[sample], batch.seed, size)
    made = {"total": points.count.sum()[None]}
    if first or last:
        made["groups"] = groups
    if first:
        made |= _for_states(placed, whole, of_point, size)
    if last:
        made |= _for_losses(whole, of_point, masks, others)
    there = dict(zip(made, upload(list(made.values()), device()), strict=True))
    extra = {name: there.get(f"extra.{name}", extra) for name, extra in whole.extra.items()}
    whole = replace(whole, extra=extra)
    of_rows = None if answers is None else readings(answers, whole.query, needed, size)
    of_loss = {
        name: readings(other, whole.reads[name], torch.ones_like(needed), size, there[f"rows.{name}"])
        for name, other in others.items()
        if last
    }
    return PointPlan(
        points=points,
        size=size,
        rows=size * points.branches,
        pieces=_pieces(whole, _cut(whole, there, begins, batch.seed, size), of_rows, of_loss, size),
        total=there["total"],
        masks=there.get("masks"),
        weight=there["weight"][: len(points)] if last else None,
        count=there["count"][: len(points)] if last else None,
    )


def _for_states(placed: PlacedBatch, whole: Points, of_point: Tensor, size: int) -> dict[str, Tensor]:
    """What the first pipeline rank reads, on the CPU; `of_point` [P] is each point's group."""
    point, is_bare = in_branches(torch.arange(len(whole)), size, whole.branches)
    return {
        "states": point_table(whole.state_rows, of_point),
        "timestep": whole.timestep[point].float(),
        "condition": placed.condition_rows(whole.sample[point], whole.dropped[point] | is_bare),
    }


def _for_losses(
    whole: Points, of_point: Tensor, masks: Tensor, others: Mapping[str, Answers]
) -> dict[str, Tensor]:
    """What the last pipeline rank reads, on the CPU; `of_point` [P] is each point's group."""
    everything = torch.ones(len(whole), dtype=torch.bool)
    return {
        "targets": point_table(whole.target_rows, of_point),
        "weight": whole.weight,
        "count": whole.count,
        "masks": masks,
        **{f"extra.{name}": extra for name, extra in whole.extra.items()},
        **{f"rows.{name}": other.rows_of(whole.reads[name], everything) for name, other in others.items()},
    }


def _cut(
    whole: Points, there: Mapping[str, Tensor], begins: list[int], seed: int, size: int
) -> dict[str, Sequence[Any]]:
    """What is on the device, by micro-batch of `size` points, under the names of PointPiece."""
    rows = {"states": whole.state_rows, "targets": whole.target_rows}
    tables = {
        name: _tables(there["groups"], begins, there[name], rows[name], seed, size)
        for name in rows
        if name in there
    }
    sizes = {"timestep": size * whole.branches, "condition": size * whole.branches, "weight": size}
    return tables | {name: there[name].split(count) for name, count in sizes.items() if name in there}


def _pieces(
    whole: Points,
    columns: Mapping[str, Sequence[Any]],
    of_rows: list[Reading] | None,
    of_loss: Mapping[str, list[Reading]],
    size: int,
) -> list[PointPiece]:
    return [
        PointPiece(
            points=whole.take(slice(j * size, (j + 1) * size)),
            answers=None if of_rows is None else of_rows[j],
            others={name: each[j] for name, each in of_loss.items()},
            **{name: column[j] for name, column in columns.items()},
        )
        for j in range(len(whole) // size)
    ]


def order_of(points: Points) -> Tensor:
    """[P] int64: all points that need no answer first, then the others sample by sample."""
    key = torch.where(needs_answer(points), points.sample + 1, 0)
    return key.argsort(stable=True)


def in_order(points: Points) -> Points:
    """Them in the order of `order_of`."""
    return points.take(order_of(points))


def in_branches(index: Tensor, size: int, branches: int) -> tuple[Tensor, Tensor]:
    """The rows of forwards of `size` each: what `index` [N] says for each branch, and whether that has no condition."""
    rows = index.view(-1, 1, size).expand(-1, branches, -1)
    is_bare = torch.zeros_like(rows, dtype=torch.bool)
    is_bare[:, 1:] = True
    return rows.flatten(), is_bare.flatten()


def filled(total: int, size: int, group: int) -> Tensor:
    """Places [N] 0..total-1, and on to whole groups of `group` micro-batches of `size`."""
    whole = size * group
    return torch.arange(-(-total // whole) * whole)


def fill_up(points: Points, size: int, group: int = 1) -> Points:
    """Points for a multiple of `group` micro-batches of exactly `size`: those added have weight and count zero."""
    total = len(points)
    index = filled(total, size, group)
    whole, real = points.take(index.clamp(max=total - 1)), index < total
    return replace(whole, weight=whole.weight * real, count=whole.count * real)


def needs_answer(points: Points) -> Tensor:
    """[P] bool: whether a point's rows have a velocity coefficient that is not zero."""
    rows = torch.stack([points.state_rows, points.target_rows])[..., ANSWER_COLUMNS]
    return rows.ne(0).any(dim=-1).any(dim=0)


def _tables(
    groups: Tensor, begins: list[int], points: Tensor, rows: Tensor, seed: int, size: int
) -> list[PointTable]:
    """The tables of micro-batches as views of one table; `rows` [P, 6] are those of `points`, on the CPU."""
    cut = zip(pairwise(begins), points.split(size), uses(rows, size), strict=True)
    return [PointTable(groups[i:j], each, used, DRAWN, seed) for (i, j), each, used in cut]
