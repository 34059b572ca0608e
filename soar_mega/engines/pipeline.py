"""One forward-only pass for the answers, one forward and backward pass for the points, over megatron's schedules.

Every rank of a pipeline walks the same micro-batches. The first stage makes the states, the last one the targets;
nothing of latent size exists for more points than those of one micro-batch.
"""

from collections.abc import Callable, Iterator
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
from soar_mega.engines.channel import Answers, RolloutChannel
from soar_mega.stages.points import Points, Queries, gather_sources
from soar_mega.stages.sources import Sources

Loss = Callable[[Points, Tensor], Tensor]
ANSWER_COLUMNS = slice(2, 4)  # v_uncond and v_cond among the six sources


class Pipeline:
    """This rank's part of the model, and the schedule that drives it.

    Args:
        chunks: each model chunk, an MMDiT, in its wrapper (megatron's DistributedDataParallel); several are
            interleaved.
    """

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = chunks
        self.dtype = next(chunks[0].module.parameters()).dtype
        self.patch_size = chunks[0].module.sizes.patch_size
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

    @torch.no_grad()  # forward_only alone would still record a graph
    def predict(
        self,
        inputs: Callable[[Any], tuple[Tensor, Tensor, Tensor, Tensor]],
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
        inputs: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        latent_size: tuple[int, int],
        text_length: int,
    ) -> Tensor:
        """One forward of a chunk; `inputs` (latents or patches, timesteps, text, pooled) for the model's first only."""
        if inputs is None:
            return chunk(None, None, None, None, latent_size=latent_size, text_length=text_length)
        latents, timesteps, text, pooled = inputs
        return chunk(
            latents.to(device(), self.dtype),
            timesteps.to(device(), torch.float32),
            text.to(device(), self.dtype),
            pooled.to(device(), self.dtype),
            latent_size=latent_size,
            text_length=text_length,
        )


def answer_pass(
    pipeline: Pipeline, channel: RolloutChannel | None, batch: Batch, queries: Queries, micro_batch_size: int
) -> Answers:
    """Answer all queries of a batch: the conditional and the unconditional branch in one forward of both."""
    answers = Answers(micro_batch_size, queries.unconditional, channel)
    count = -(-len(batch) // micro_batch_size)
    index = filled(len(batch), micro_batch_size, pipeline.group).clamp(max=len(batch) - 1)
    steps = list(enumerate(index.split(micro_batch_size)))
    rows = micro_batch_size * (2 if queries.unconditional else 1)
    if channel is not None:
        channel.open(count, (rows, *batch.latent_shape))

    def inputs(step: tuple[int, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i, sample = step
        if channel is not None:
            channel.advance(i)
        dropped = queries.dropped[sample]
        if queries.unconditional:
            sample, dropped = torch.cat([sample, sample]), torch.cat([dropped, torch.ones_like(dropped)])
        states = query_states(batch, queries, sample, pipeline.dtype, pipeline.patch_size)
        return states, queries.timestep[sample], *conditions(batch, sample, dropped)

    def outputs(step: tuple[int, Tensor], velocity: Tensor) -> None:
        if step[0] < count:  # the others only fill up the schedule
            answers.put(step[0], velocity.float().contiguous())

    pipeline.predict(inputs, outputs, steps, rows, latent_size(batch), batch.text_length)
    if channel is not None:
        channel.end_pass()
    return answers


def learn_pass(
    pipeline: Pipeline,
    batch: Batch,
    answers: Answers | None,
    points: Points,
    loss: Loss,
    normaliser: float,
    size: int,
) -> Tensor | None:
    """Forward and backward over `points`, `size` of them at a time: gradients of sum(weight loss) / normaliser.

    Returns the loss of each point, [P] float64 on the last stage, None elsewhere.
    """
    pieces = list(cut(points, size, pipeline.group))
    last_use = last_uses(pieces, answers)
    scale = pipeline.averaging(len(pieces)) / normaliser
    losses: list[Tensor] = []

    def weighted(piece: Points, velocity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        per_point = loss(piece, velocity)
        losses.append(per_point.detach().double())
        return (per_point * (piece.weight * scale).to(per_point)).sum(), {}

    def forward_step(iterator: Iterator[tuple[int, Points]], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        j, piece = next(iterator)
        is_end = chunk.module.pre_process or chunk.module.post_process
        if is_end:
            piece = with_sources(batch, piece, answers)
        inputs = None
        if chunk.module.pre_process:
            # the only place where a state is cast, and it is written as the model reads it
            states = piece.states(pipeline.dtype, pipeline.patch_size)
            inputs = (states, piece.timestep, *conditions(batch, piece.sample, piece.dropped))
        velocity = pipeline.forward(chunk, inputs, latent_size(batch), batch.text_length)
        if is_end:  # a rank with several chunks has at most one that needs answers
            for i in last_use.get(j, ()):
                assert answers is not None
                answers.drop(i)
        return velocity, partial(weighted, piece)

    pipeline.run(forward_step, list(enumerate(pieces)), size, latent_size(batch), batch.text_length)
    return torch.cat(losses)[: len(points)] if losses else None


def predict_velocity(
    pipeline: Pipeline, latents: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, size: int
) -> Tensor:
    """Velocity [B, C, H, W] float32 of given states, `size` of them per forward, on every rank of the pipeline."""
    index = filled(len(latents), size, pipeline.group).clamp(max=len(latents) - 1)
    found: list[Tensor] = []

    def inputs(sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return latents[sample], timestep[sample], text[sample], pooled[sample]

    def outputs(_: Tensor, velocity: Tensor) -> None:
        found.append(velocity.float())

    height, width = latents.shape[-2:]
    pipeline.predict(inputs, outputs, list(index.split(size)), size, (height, width), text.shape[1])
    result = torch.cat(found)[: len(latents)] if found else torch.empty(latents.shape, device=device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(result, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return result


def in_order(points: Points) -> Points:
    """All base points first, because they need no answer, then the auxiliary points sample by sample."""
    key = torch.where(points.auxiliary, points.sample + 1, 0)
    return points.take(key.argsort(stable=True))


def filled(total: int, size: int, group: int) -> Tensor:
    """Places [N] 0..total-1, and on to whole groups of `group` micro-batches of `size`."""
    whole = size * group
    return torch.arange(-(-total // whole) * whole)


def cut(points: Points, size: int, group: int = 1) -> Iterator[Points]:
    """Micro-batches of exactly `size` points, a multiple of `group` of them.

    The tail is filled with points of weight and count zero.
    """
    total = len(points)
    for index in filled(total, size, group).split(size):
        piece, real = points.take(index.clamp(max=total - 1)), index < total
        yield replace(piece, weight=piece.weight * real, count=piece.count * real)


def needs_answer(points: Points) -> Tensor:
    """[P] bool: whether a point's rows have a velocity coefficient that is not zero."""
    rows = torch.stack([points.state_rows, points.target_rows])[..., ANSWER_COLUMNS]
    return rows.ne(0).any(dim=-1).any(dim=0)


def last_uses(pieces: list[Points], answers: Answers | None) -> dict[int, list[int]]:
    """By micro-batch of points: the answers that no later one needs."""
    last: dict[int, int] = {}
    if answers is not None:
        for j, piece in enumerate(pieces):
            last.update({int(i): j for i in piece.sample[needs_answer(piece)] // answers.micro_batch_size})
    return {j: [i for i in last if last[i] == j] for j in set(last.values())}


def with_sources(batch: Batch, piece: Points, answers: Answers | None) -> Points:
    """The micro-batch with the sources of its samples: the first stage makes states of them, the last one losses."""
    samples = piece.sample.unique()
    v_uncond, v_cond = None, None
    if answers is not None:
        wanted = torch.isin(samples, piece.sample[needs_answer(piece)])
        v_uncond, v_cond = answers.velocities(samples, wanted)
    return replace(piece, sources=gather_sources(batch, piece, v_uncond, v_cond, samples))


def query_states(
    batch: Batch, queries: Queries, sample: Tensor, dtype: torch.dtype, patch_size: int | None = None
) -> Tensor:
    """States [M, C, H, W], or patches [M, H W / p^2, C p p], of the queries at `sample` [M]: rows over z0 and z1."""
    assert batch.latents is not None
    sources = Sources(
        seed=batch.seed,
        position=batch.position,
        z0=batch.latents,
        v_uncond=None,
        v_cond=None,
        sample=sample,
        path=torch.zeros_like(sample),
        fused=queries.fused,
    )
    return sources.combine(queries.rows[sample], dtype, patch_size)


def conditions(batch: Batch, sample: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """(text [M, S, D], pooled [M, P]) of the samples at `sample` [M], the empty prompt where `dropped` [M]."""
    assert batch.text is not None and batch.pooled is not None
    text, pooled = batch.text[sample], batch.pooled[sample]
    if bool(dropped.any()):
        assert batch.empty_text is not None and batch.empty_pooled is not None
        text[dropped] = batch.empty_text.to(text)
        pooled[dropped] = batch.empty_pooled.to(pooled)
    return text, pooled


def latent_size(batch: Batch) -> tuple[int, int]:
    """(height, width) of a batch's latents, known on every stage."""
    return batch.latent_shape[1], batch.latent_shape[2]
