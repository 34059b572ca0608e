"""How much memory training takes on a rank, from the sizes of a model and the settings of a run.

Weights, gradients and optimizer are what the engines allocate, to the padding. Activations are what autograd keeps with
the fused kernels, tensor by tensor; without them (model.fused_kernels=false) it is more, and where some of a layer's
linears are frozen a little less. With FP8 they are counted as in bf16: how much less linears then keep of
their inputs was not measured.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from soar_mega.config import ModelConfig, ParallelConfig, Recipe
from soar_mega.models.common.layout import is_sequence_parallel
from soar_mega.models.common.pipeline_layout import chunks_per_rank, stage_layers
from soar_mega.models.common.rank_parameters import (
    Elements,
    buffer_elements,
    chunk_parameters,
    fp8_elements,
    trained,
    trained_linears,
)
from soar_mega.models.common.rank_tokens import RankTokens
from soar_mega.models.common.sequence_shards import cut_multiple
from soar_mega.models.common.sizes import Sizes

ITEM = {"bf16": 2, "fp32": 4}
FP8_FORMS = 2  # of a weight, with a byte an element: as it is and transposed (te_layers.py)
BUCKET = 40_000_000  # elements of a gradient bucket of megatron's, at least, where reduction is overlapped
ZERO_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once
# H per token that a backward holds beside what was kept: gradients around the MLP
BACKWARD = 5
# and of what is made again beside them, at most: the MLP's activation
MADE_AGAIN = 4
# H per token that are alive at once in a forward without gradients: qkv, its parts, the joint ones, two streams
FORWARD = 13


@dataclass(frozen=True)
class Workload:
    """What a data-parallel rank works on in a step.

    Attributes:
        latent_size: (H, W) of the latents, an eighth of the pixels.
        text_length: tokens, as prepared: 77 of CLIP and max_sequence_length of T5.
        points: of one training forward, both branches of guidance counted.
        rows: of the largest forward without a gradient, likewise; 0: there is none.
        samples: of the rank's share of the global batch.
        micro_batches: training forwards of a step, those included that fill up an interleaved pipeline.
    """

    latent_size: tuple[int, int]
    text_length: int
    points: int
    rows: int
    samples: int
    micro_batches: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int  # and their FP8 forms
    gradients: int
    optimizer: int  # main copies and moments
    kept: int  # EMA, and the copies that the method wants
    activations: int  # between forward and backward
    batch: int  # latents, conditions and answers of the rank's samples
    temporary: int  # the most that comes on top, in a backward or in the answer pass
    on_host: int  # kept copies in the host's memory, which are no part of the total

    @property
    def parts(self) -> dict[str, int]:
        """What is on the device, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "on_host"}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def words(self) -> str:
        """The sum and its parts, and what is kept on the host."""
        parts = ", ".join(f"{name} {_amount(size)}" for name, size in self.parts.items() if size)
        host = f"; kept on the host {_amount(self.on_host)}" if self.on_host else ""
        return f"{_amount(self.total)}: {parts}{host}"


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def workload(
    recipe: Recipe,
    data_size: int,
    latent_size: tuple[int, int],
    text_length: int,
    points: int | None = None,
    is_told: bool = False,
) -> Workload:
    """The share of one of `data_size` replicas in a step of a recipe.

    Args:
        points: of a forward, in place of the recipe's.
        is_told: whether the model is told a guidance scale (`Sizes.guidance_embeds`).
    """
    train, stage = recipe.train, recipe.stage
    samples = train.global_batch_size // data_size
    forwards = stage.asking(is_told).forwards()
    branches, total = forwards.point_branches, points_of(recipe, data_size)
    size = min(points or train.points_per_micro_batch or train.micro_batch_size, total)
    asked = min(train.micro_batch_size * forwards.query_branches, math.ceil(samples * forwards.answers))
    rows = max(asked, stage.drawn_rows)
    group = recipe.parallel.pipeline_model_parallel_size if chunks_per_rank(recipe.parallel) > 1 else 1
    micro_batches = -(-total // (size * group)) * group
    return Workload(latent_size, text_length, size * branches, rows, samples, micro_batches)


def points_of(recipe: Recipe, data_size: int) -> int:
    """Points of a step on one of `data_size` replicas."""
    forwards = recipe.stage.forwards()
    return recipe.train.global_batch_size // data_size * forwards.points // forwards.point_branches


def rank_memory(sizes: Sizes, recipe: Recipe, work: Workload, data_size: int, rank: int = 0) -> Memory:
    """What training takes on the ranks of one pipeline rank.

    Raises:
        ValueError: a layout that is not possible.
    """
    return _working(sizes, recipe, work, rank, _resting(sizes, recipe, data_size, rank))


def resting(sizes: Sizes, recipe: Recipe, data_size: int) -> list[Memory]:
    """What each pipeline rank holds whatever it works on; `largest_rank` takes it, to be asked of many workloads.

    Raises:
        ValueError: a layout that is not possible.
    """
    ranks = range(recipe.parallel.pipeline_model_parallel_size)
    return [_resting(sizes, recipe, data_size, rank) for rank in ranks]


def _resting(sizes: Sizes, recipe: Recipe, data_size: int, rank: int) -> Memory:
    model, parallel = recipe.model, recipe.parallel
    chunks = chunk_parameters(sizes, recipe, rank)
    weights, gradients, optimizer, zero_temporary = _state(chunks, model, parallel, data_size)
    weights += ITEM[model.dtype] * (buffer_elements(sizes) if rank == 0 else 0)
    weights += FP8_FORMS * fp8_elements(sizes, recipe, rank)
    kept = kept_copies(recipe) * _copy_bytes(chunks, parallel, data_size)
    on_host = recipe.train.offload_kept_weights
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        kept=0 if on_host else kept,
        activations=0,
        batch=0,
        temporary=zero_temporary,
        on_host=kept if on_host else 0,
    )


def _working(sizes: Sizes, recipe: Recipe, work: Workload, rank: int, rests: Memory) -> Memory:
    activations, temporary = _activations(sizes, recipe, work, rank)
    batch = _batch(sizes, recipe, work, rank)
    return replace(rests, activations=activations, batch=batch, temporary=rests.temporary + temporary)


def kept_copies(recipe: Recipe) -> int:
    """How many copies of the weights are kept: with adapters the reference is the model without them."""
    names = {name for name in recipe.stage.kept_copies if not (name == "reference" and recipe.lora.rank)}
    return len(names) + (recipe.train.ema_decay > 0)


def _copy_bytes(chunks: list[list[Elements]], parallel: ParallelConfig, data_size: int) -> int:
    divided = (
        parallel.zero_stage > 0 if parallel.engine == "deepspeed" else parallel.use_distributed_optimizer
    )
    shares = data_size * parallel.context_parallel_size if divided else 1
    return 4 * sum(map(trained, chunks)) // shares


def largest_rank(
    sizes: Sizes, recipe: Recipe, work: Workload, data_size: int, rests: Sequence[Memory] | None = None
) -> Memory:
    """The memory of the pipeline rank that needs most.

    Args:
        rests: `resting` of this recipe, where it is known.
    """
    known = rests or resting(sizes, recipe, data_size)
    return max(
        (_working(sizes, recipe, work, rank, held) for rank, held in enumerate(known)), key=lambda m: m.total
    )


def _state(
    chunks: list[list[Elements]], model: ModelConfig, parallel: ParallelConfig, data_size: int
) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients and optimizer, and what DeepSpeed reduces with."""
    elements = sum(parameter.size for chunk in chunks for parameter in chunk)
    learning, item = sum(map(trained, chunks)), ITEM[model.dtype]
    main = 0 if model.dtype == "fp32" else 4
    if parallel.engine == "deepspeed":
        return _zero_state(elements, learning, item, parallel.zero_stage, data_size)
    if not parallel.use_distributed_optimizer:
        return item * elements, 4 * learning, (main + 8) * learning, 0
    replicas = data_size * parallel.context_parallel_size
    bucket = max(BUCKET, 1_000_000 * replicas) if parallel.overlap_grad_reduce else None
    buffers = [[parameter.size for parameter in chunk if parameter.is_trained] for chunk in chunks]
    padded = sum(
        padded_elements(buffer, replicas, None if number else bucket) for number, buffer in enumerate(buffers)
    )
    return item * (elements - learning + padded), 4 * padded, (main + 8) * learning // replicas, 0


def padded_elements(parameters: Sequence[int], replicas: int, bucket: int | None) -> int:
    """Elements of megatron's buffer: a parameter starts at a multiple of 64, a bucket can be cut over the replicas."""
    divisor = math.lcm(replicas, 128)
    end = start = 0
    for count in reversed(parameters):
        end = -(-end // 64) * 64 + count
        if bucket is not None and end - start >= bucket:
            start = end = -(-end // divisor) * divisor
    return -(-end // divisor) * divisor


def _zero_state(
    elements: int, learning: int, item: int, stage: int, data_size: int
) -> tuple[int, int, int, int]:
    """Args: elements: of all parameters. learning: of the trained ones."""
    share = -(-learning // data_size)
    bucket = 4 * min(ZERO_BUCKET, learning)
    if stage == 0:  # float32 alone; the main copies are the parameters
        return item * elements, 4 * learning, 8 * learning, 0
    if stage == 3:
        return -(-item * elements // data_size), bucket + 4 * share, 12 * share, item * elements // 8
    if stage == 1 and item == 2:  # the gradients of the model's type stay beside the float32 ones
        return item * elements, (4 + 2) * learning, 12 * share, 0
    return item * elements, 4 * share, 12 * share, bucket


def _activations(sizes: Sizes, recipe: Recipe, work: Workload, rank: int) -> tuple[int, int]:
    """Bytes that a pipeline rank keeps for all micro-batches in flight, and the most that comes on top."""
    parallel, model, item = recipe.parallel, recipe.model, ITEM[recipe.model.dtype]
    stages, ranks = stage_layers(sizes, parallel), parallel.pipeline_model_parallel_size
    flight = in_flight(ranks, chunks_per_rank(parallel), rank, work.micro_batches)
    tokens = tokens_per_rank(sizes, parallel, work)
    kept, largest = 0.0, 0.0
    for chunk, count in enumerate(flight):
        stage = chunk * ranks + rank
        layers = stages[stage]
        mine = [
            sizes.family.layer_bytes(sizes, tokens, number, item, not_kept(sizes, recipe, number))
            for number in layers
        ]
        recomputed = [is_recomputed(model, number) for number in layers]
        per_point = sum(tokens.inputs(sizes, item) if again else own for own, again in zip(mine, recomputed))
        if stage == 0:
            per_point += sizes.family.embedding_bytes(sizes, work.latent_size, work.text_length, item)
        if stage == len(stages) - 1:
            per_point += 2 * tokens.whole[1] * sizes.hidden_size * item  # its input and what is projected
            # velocity, target, gradient
            per_point += 3 * 4 * sizes.out_channels * math.prod(work.latent_size)
        elif len(flight) > 1:  # the interleaved schedule keeps what it has sent
            per_point += tokens.inputs(sizes, item)
        kept += count * per_point
        largest = max([largest, *(own for own, again in zip(mine, recomputed) if again)])
    held, kept = tokens.inputs(sizes, item), kept * work.points
    again = MADE_AGAIN * held if "mlp_act" in model.made_again else 0
    backward = work.points * (largest + BACKWARD * held + again)
    answering = work.rows * FORWARD * held
    if has_graphs(recipe):  # each recording keeps its memory
        return round(kept), round(backward + answering)
    return round(kept), round(max(backward, answering - kept))  # nothing is kept while answers are made


def not_kept(sizes: Sizes, recipe: Recipe, number: int) -> frozenset[str]:
    """Parts of a layer that are made again in backward, or read by linears alone of which nothing is trained.

    mlp_layernorm: what is modulated for an MLP, where attention has its own.
    """
    linears, parts = trained_linears(sizes, recipe, number), recipe.model.made_again
    if "linear_fc2" not in linears:
        parts |= {"mlp_act"}
    if "linear_fc1" not in linears:
        parts |= {"mlp_layernorm"}
    if linears.isdisjoint(("linear_qkv", "linear_fc1")):
        parts |= {"layernorm"}
    return parts


def has_graphs(recipe: Recipe) -> bool:
    """Whether layers run as CUDA graphs: under DeepSpeed they do without."""
    return recipe.train.cuda_graphs == "layers" and recipe.parallel.engine == "megatron"


def in_flight(ranks: int, chunks: int, rank: int, micro_batches: int) -> list[int]:
    """Micro-batches of each model chunk of a pipeline rank that have run forward and not backward, at most."""
    if chunks == 1:
        return [min(ranks - rank, micro_batches)]
    forwards = min((ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1, micro_batches * chunks)
    counted = Counter(k // ranks % chunks for k in range(forwards))
    return [counted[chunk] for chunk in range(chunks)]


def tokens_per_rank(sizes: Sizes, parallel: ParallelConfig, work: Workload) -> RankTokens:
    """The streams of one point as they lie on a rank."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    shards = context * (tensor if is_sequence_parallel(parallel) else 1)
    lengths = (work.text_length, math.prod(work.latent_size) // sizes.patch_size**2)
    multiple = cut_multiple(shards)
    padded = [-(-length // multiple) * multiple for length in lengths]
    text, image = (length / (tensor * context) for length in padded)
    is_copied = [context > 1 or length != before for length, before in zip(padded, lengths)]
    return RankTokens(
        whole=(padded[0] / shards, padded[1] / shards),
        cut=(text, image),
        attending=(lengths[0] / (tensor * context), lengths[1] / (tensor * context)),
        copied=(text * is_copied[0], image * is_copied[1]),
    )


def is_recomputed(model: ModelConfig, number: int) -> bool:
    """Whether a layer is computed again in backward."""
    return model.recompute_granularity == "full" and number % model.recompute_every == 0


def _batch(sizes: Sizes, recipe: Recipe, work: Workload, rank: int) -> int:
    """Bytes of latents and answers on the first and the last rank, and of text on the first."""
    latent = 4 * sizes.in_channels * math.prod(work.latent_size)
    answers = recipe.stage.asking(sizes.guidance_embeds).forwards().answers if work.rows else 0
    ranks = recipe.parallel.pipeline_model_parallel_size
    per_sample = latent * (1 + answers) if rank in (0, ranks - 1) else 0
    if rank == 0:
        per_sample += ITEM[recipe.model.dtype] * work.text_length * sizes.joint_attention_dim
    return round(work.samples * per_sample)
