"""One forward-only pass for the answers, one forward and backward pass for the points, over megatron's schedules.

Every rank of a pipeline walks the same micro-batches. The first stage makes the states, the last one the targets;
nothing of latent size exists for more points than those of one micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.distributed import device
from soar_mega.engines.branches import Branches, branches_of
from soar_mega.engines.channel import Answers, RolloutChannel
from soar_mega.engines.plan import PlacedBatch, PointPiece, PointPlan, QueryPiece, filled, query_pieces
from soar_mega.models.common.answering import answering
from soar_mega.models.common.conditions import Conditions
from soar_mega.stages.latent_sources import Sources
from soar_mega.stages.points import Points, Queries
from soar_mega.upload import upload

Loss = Callable[[Points, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Conditions]  # latents or their patches, timesteps in 0..1000, conditions


class Pipeline:
    """This rank's part of the model, and the schedule that drives it.

    Args:
        chunks: each model chunk, a Transformer, in its wrapper (megatron's DistributedDataParallel); several are
            interleaved.
    """

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = chunks
        self.dtype = next(chunks[0].module.parameters()).dtype
        self.patch_size = chunks[0].module.sizes.patch_size
        self.is_first = any(chunk.module.pre_process for chunk in chunks)
        self.is_last = any(chunk.module.post_process for chunk in chunks)
        # interleaved micro-batches come in groups of the pipeline's length
        self.group = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1

    def run(
        self,
        forward_step: Callable[[Iterator[Any], Any], tuple[Tensor, Callable[..., Any]]],
        steps: list[Any],
        rows: int,
        latent_size: tuple[int, int],
        text_length: int,
        forward_only: bool = False,
    ) -> None:
        """Call `forward_step` for each of `steps` and model chunk; `rows` is the batch dimension of a forward."""
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(steps) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(steps),
            seq_length=self.chunks[0].module.pipeline_sequence_length(latent_size, text_length),
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def averaging(self, micro_batches: int) -> int:
        """What losses are divided by on their way: by the schedule, and by DDP in reducing the gradients.

        Every rank of a CP group computes the whole loss, and its backward the share of its own tokens: the sum over
        CP is the gradient. The schedule multiplies by CP / micro_batches, DDP averages over DP x CP: CP cancels.
        """
        return micro_batches * parallel_state.get_data_parallel_world_size()

    @answering()
    @torch.no_grad()  # forward_only alone would still record a graph
    def predict(
        self,
        inputs: Callable[[Any], Inputs],
        outputs: Callable[[Any, Tensor], None],
        steps: list[Any],
        rows: int,
        latent_size: tuple[int, int],
        text_length: int,
    ) -> None:
        """Forward only: `inputs(step)` is called on the first stage, `outputs(step, velocity)` on the last."""

        def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Tensor, Callable[..., None]]:
            step = next(iterator)
            first = inputs(step) if chunk.module.pre_process else None
            velocity = self.forward(chunk, first, latent_size, text_length)
            return velocity, lambda output, non_loss_data: outputs(step, output)

        self.run(forward_step, steps, rows, latent_size, text_length, forward_only=True)

    def forward(
        self,
        chunk: Any,
        inputs: Inputs | None,
        latent_size: tuple[int, int],
        text_length: int,
    ) -> Tensor:
        """One forward of a chunk; `inputs` for the model's first only."""
        if inputs is None:
            return chunk(None, None, None, latent_size=latent_size, text_length=text_length)
        latents, timesteps, conditions = inputs
        return chunk(
            latents.to(device(), self.dtype),
            timesteps.to(device(), torch.float32),
            conditions.to(device(), self.dtype),
            latent_size=latent_size,
            text_length=text_length,
        )


def answer_pass(
    pipeline: Pipeline, channel: RolloutChannel | None, placed: PlacedBatch, queries: Queries, size: int
) -> Answers:
    """Answer queries at a batch, at most `size` at a time: both branches of them in one forward.

    Where they have further steps, each is a pass of its own, and what is kept is the mean velocity of the way.
    """
    branches = branches_of(queries, size)
    answers = _one_pass(pipeline, channel, placed, queries, branches)
    for step in queries.then:
        asked = replace(queries, timestep=step.timestep, rows=step.rows)
        before, answers = answers, _one_pass(pipeline, channel, placed, asked, branches, answers, step.share)
        before.close()
    return answers


def _one_pass(
    pipeline: Pipeline,
    channel: RolloutChannel | None,
    placed: PlacedBatch,
    queries: Queries,
    branches: Branches,
    before: Answers | None = None,
    share: Tensor | None = None,
) -> Answers:
    """The forwards of a pass.

    Args:
        before: what the rows of the queries read; share: [Q] float64, how much of each mean the new velocity makes.
    """
    batch = placed.batch
    answers = Answers(branches, batch.latent_shape, channel)
    steps = range(len(filled(branches.count, 1, pipeline.group)))
    pieces = query_pieces(placed, queries, branches, before, pipeline.group) if pipeline.is_first else []
    if share is not None and pipeline.is_last:
        [share] = upload([share[branches.query].float()[..., None, None, None]], device())

    def inputs(i: int) -> Inputs:
        answers.advance(i)
        piece = pieces[i]
        velocities = (None, None) if before is None else before.velocities([min(i, answers.count - 1)])
        states = query_states(placed, piece, velocities, queries.fused, pipeline.dtype, pipeline.patch_size)
        return states, piece.timestep, placed.conditions_at(piece.condition)

    def outputs(i: int, velocity: Tensor) -> None:
        if i >= answers.count:
            return  # only fills up the schedule
        if before is not None and share is not None:
            velocity = before.get(i).lerp(velocity.float(), share[i])
        answers.put(i, velocity)

    pipeline.predict(inputs, outputs, list(steps), branches.rows, latent_size(batch), batch.text_length)
    answers.end_pass()
    return answers


def learn_pass(
    pipeline: Pipeline,
    placed: PlacedBatch,
    plan: PointPlan,
    loss: Loss,
    normaliser: Tensor,
    observes: Sequence[str] = (),
) -> Tensor | None:
    """Forward and backward over the points of a plan: gradients of sum(weight loss) / normaliser.

    Args:
        normaliser: [1] float64, on the device.
        observes: what the loss puts into `Points.observed`.

    Returns:
        [1 + O, P] float64 on the last stage, None elsewhere: the loss of each point, and what was observed there.
    """
    batch = placed.batch
    scale = pipeline.averaging(len(plan.pieces)) / normaliser
    found: list[Tensor] = []

    def weighted(weight: Tensor | None, points: Points, velocity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert weight is not None
        per_point = loss(points, guided(points, velocity))
        seen = [per_point, *(points.observed[name] for name in observes)]
        found.append(torch.stack([values.detach().double() for values in seen]))
        return (per_point * (weight * scale).to(per_point)).sum(), {}

    def forward_step(iterator: Iterator[PointPiece], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        piece = next(iterator)
        points, velocity = forward_points(pipeline, chunk, placed, piece)
        return velocity, partial(weighted, piece.weight, points)

    pipeline.run(forward_step, plan.pieces, plan.rows, latent_size(batch), batch.text_length)
    return torch.cat(found, dim=1)[:, : len(plan.points)] if found else None


@torch.no_grad()
def measure_pass(pipeline: Pipeline, placed: PlacedBatch, plan: PointPlan, function: Loss) -> Tensor:
    """What `learn_pass` would give the loss, in the same micro-batches, given to another function: [P] float64.

    On every rank of the pipeline; nothing is kept for a backward.
    """
    batch = placed.batch
    found: list[Tensor] = []

    def forward_step(iterator: Iterator[PointPiece], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        points, velocity = forward_points(pipeline, chunk, placed, next(iterator))
        return velocity, lambda output, non_loss_data: found.append(
            function(points, guided(points, output)).double()
        )

    pipeline.run(
        forward_step, plan.pieces, plan.rows, latent_size(batch), batch.text_length, forward_only=True
    )
    shape = (len(plan.points),)
    result = (
        torch.cat(found)[: len(plan.points)]
        if found
        else torch.empty(shape, dtype=torch.float64, device=device())
    )
    return on_every_rank(result)


def forward_points(
    pipeline: Pipeline, chunk: Any, placed: PlacedBatch, piece: PointPiece
) -> tuple[Points, Tensor]:
    """One forward of a chunk: the points, with sources where the model begins or ends, and what the chunk gives."""
    batch, points, inputs = placed.batch, piece.points, None
    if chunk.module.pre_process or chunk.module.post_process:
        points = piece.with_sources(placed)
    if chunk.module.pre_process:
        assert piece.timestep is not None and piece.condition is not None
        # the only place where a state is cast, and it is written as the model reads it
        states = points.states(pipeline.dtype, pipeline.patch_size)
        both = states if points.branches == 1 else torch.cat([states, states])
        inputs = (both, piece.timestep, placed.conditions_at(piece.condition))
    return points, pipeline.forward(chunk, inputs, latent_size(batch), batch.text_length)


def guided(points: Points, velocity: Tensor) -> Tensor:
    """[M, C, H, W]: the velocity [rows, C, H, W] of a forward at the guidance scale of its points, in float32."""
    if points.branches == 1:
        return velocity
    assert points.guidance_scale is not None
    cond, uncond = velocity.float().chunk(2)
    if points.detach_unconditional:
        uncond = uncond.detach()
    return uncond + points.guidance_scale * (cond - uncond)


def predict_velocity(
    pipeline: Pipeline, latents: Tensor, timestep: Tensor, conditions: Conditions, size: int
) -> Tensor:
    """Velocity [B, C, H, W] float32 of given states, `size` of them per forward, on every rank of the pipeline."""
    index = filled(len(latents), size, pipeline.group).clamp(max=len(latents) - 1)
    found: list[Tensor] = []

    def inputs(sample: Tensor) -> Inputs:
        return latents[sample], timestep[sample], conditions.map(lambda tensor: tensor[sample])

    def outputs(_: Tensor, velocity: Tensor) -> None:
        found.append(velocity.float())

    height, width = latents.shape[-2:]
    pipeline.predict(inputs, outputs, list(index.split(size)), size, (height, width), conditions.text_length)
    result = torch.cat(found)[: len(latents)] if found else torch.empty(latents.shape, device=device())
    return on_every_rank(result)


def on_every_rank(result: Tensor) -> Tensor:
    """What the last rank of the pipeline holds, on all of them; it is written into their tensors."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(result, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return result


def query_states(
    placed: PlacedBatch,
    piece: QueryPiece,
    velocities: tuple[Tensor | None, Tensor | None],
    fused: bool,
    dtype: torch.dtype,
    patch_size: int | None = None,
) -> Tensor:
    """States [M, C, H, W], or patches [M, H W / p^2, C p p], of queries; `velocities` are (v_uncond, v_cond)."""
    assert placed.batch.latents is not None
    v_uncond, v_cond = velocities
    sources = Sources(
        z0=placed.batch.latents,
        v_uncond=v_uncond,
        v_cond=v_cond,
        states=piece.table,
        targets=None,
        fused=fused,
    )
    return sources.combine(piece.table, dtype, patch_size)


def latent_size(batch: Batch) -> tuple[int, int]:
    """(height, width) of a batch's latents, known on every stage."""
    return batch.latent_shape[1], batch.latent_shape[2]
