"""Which layers each pipeline stage holds: as even as their work allows, or as the recipe says.

With V model chunks on each of PP ranks the layers are cut into PP x V virtual stages: stage s is chunk s // PP of
rank s % PP.
"""

from functools import cache
from itertools import accumulate

from soar_mega.config import ParallelConfig
from soar_mega.config_checks import check_pipeline
from soar_mega.models.common.flops import Tokens, Work, output_work
from soar_mega.models.common.sizes import Sizes

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


def chunks_per_rank(parallel: ParallelConfig) -> int:
    """V: model chunks on each pipeline rank."""
    return parallel.virtual_pipeline_model_parallel_size or 1


def stage_layers(sizes: Sizes, parallel: ParallelConfig) -> list[range]:
    """Global numbers of the layers of each virtual stage: contiguous, at least one each.

    The slowest stage is as fast as possible; the embedding counts on the first stage and the output on the last (about
    a hundredth of a layer in SD3.5). Among equals the early stages get less: they keep more micro-batches alive.

    Raises:
        ValueError: a split that is not possible, with the nearest one that is.
    """
    fixed = _fixed_sizes(sizes.num_layers, parallel)
    counts = _balanced(*_usual_work(sizes), tuple(fixed))
    return [range(end - size, end) for size, end in zip(counts, accumulate(counts))]


def rank_layers(sizes: Sizes, parallel: ParallelConfig, rank: int) -> list[range]:
    """The layers of each model chunk of a pipeline rank."""
    return stage_layers(sizes, parallel)[rank :: parallel.pipeline_model_parallel_size]


def stage_work(sizes: Sizes, parallel: ParallelConfig, tokens: Tokens) -> list[Work]:
    """What each virtual stage does in a forward of one sample, over its tensor- and context-parallel ranks together."""
    stages = [
        sum((sizes.family.layer_work(sizes, number, tokens) for number in layers), Work())
        for layers in stage_layers(sizes, parallel)
    ]
    stages[0] += sizes.family.embedding_work(sizes, tokens)
    stages[-1] += output_work(sizes, tokens)
    return stages


def _fixed_sizes(num_layers: int, parallel: ParallelConfig) -> list[int | None]:
    """The number of layers of each virtual stage where the recipe says it."""
    check_pipeline(parallel)
    ranks, chunks = parallel.pipeline_model_parallel_size, chunks_per_rank(parallel)
    _check_size(num_layers, ranks, chunks)
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    fixed: list[int | None] = [None] * (ranks * chunks)
    others = num_layers
    for size, rank in ((first, 0), (last, ranks - 1)):
        if size is not None:
            fixed[rank::ranks] = [size // chunks] * chunks
            others -= size
    free = fixed.count(None)
    if others < free or (free == 0 and others > 0):
        raise ValueError(_advice(num_layers, ranks, chunks, first, last))
    return fixed


def _check_size(num_layers: int, ranks: int, chunks: int) -> None:
    if ranks > num_layers:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size={ranks} is more than the {num_layers} layers of this model: each "
            f"stage needs at least one; largest possible is {num_layers}"
        )
    if ranks * chunks > num_layers:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} on {ranks} pipeline ranks asks for "
            f"{ranks * chunks} virtual stages, more than the {num_layers} layers of this model; largest possible here "
            f"is {num_layers // ranks}"
        )


def _advice(num_layers: int, ranks: int, chunks: int, first: int | None, last: int | None) -> str:
    given = " and ".join(f"parallel.{k}={n}" for k, n in ((FIRST, first), (LAST, last)) if n is not None)
    both = first is not None and last is not None
    middle = (ranks - 2 if both else ranks - 1) * chunks
    if not middle:
        assert first is not None and last is not None
        nearest = max(chunks, min(first, num_layers - chunks)) // chunks * chunks
        words = f"leave parallel.{LAST} out"
        if (num_layers - nearest) % chunks == 0:
            words += f", or set parallel.{FIRST}={nearest} parallel.{LAST}={num_layers - nearest}"
        return f"{given} do not add up to the {num_layers} layers of this model: {words}"
    most = (num_layers - middle) // chunks * chunks
    together = "together at most" if both else "at most"
    return (
        f"{given} leave fewer than one of the {num_layers} layers to each of the {middle} other stages: set "
        f"{together} {most}"
    )


@cache
def _usual_work(sizes: Sizes) -> tuple[tuple[int, ...], int, int]:
    """Of each layer, the embedding and the output."""
    tokens = sizes.family.usual_tokens(sizes)
    layers = tuple(sizes.family.layer_work(sizes, number, tokens).total for number in range(sizes.num_layers))
    return layers, sizes.family.embedding_work(sizes, tokens).total, output_work(sizes, tokens).total


@cache
def _balanced(
    work: tuple[int, ...], embedding: int, output: int, fixed: tuple[int | None, ...]
) -> tuple[int, ...]:
    """Sizes of the stages: the least work on the slowest one, then the most even."""
    done = [0, *accumulate(work)]
    # layers cut so far -> (work of the slowest stage, sum of squares, sizes) of the best way to cut them
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage, size in enumerate(fixed):
        is_last = stage == len(fixed) - 1
        extra = (embedding if stage == 0 else 0) + (output if is_last else 0)
        reached: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (slowest, squares, sizes) in best.items():
            choices = range(1, len(work) - start + 1) if size is None else [size]
            for count in choices:
                mine = done[min(start + count, len(work))] - done[start] + extra
                way = (max(slowest, mine), squares + mine**2, (*sizes, count))
                end = start + count
                if end <= len(work) and (end not in reached or way < reached[end]):
                    reached[end] = way
        best = reached
    return best[len(work)][2]
