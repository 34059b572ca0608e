"""Which micro-batches fit in a GPU's memory: as few and as even ones as possible, recomputing no more than must be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from soar_mega.config import ModelConfig, Recipe
from soar_mega.config_checks import check_replicas
from soar_mega.layer_checks import LINEAR_INPUTS
from soar_mega.models.common.memory import Memory, largest_rank, points_of, workload
from soar_mega.models.common.sizes import Sizes

FEWEST = 4  # points of a forward for which more recomputation is not worth its work
# model.recompute_modules that cost no matrix product: with FP8, and without
LIGHT_IN_FP8 = ("qk_layernorm",)
LIGHT = (*LINEAR_INPUTS, *LIGHT_IN_FP8)


@dataclass(frozen=True)
class MicroBatches:
    """What a recipe may say, and what it then takes on the rank that needs most."""

    points_per_micro_batch: int
    micro_batch_size: int
    model: ModelConfig
    micro_batches: int
    memory: Memory

    def words(self) -> str:
        """Lines for a recipe."""
        return (
            f"  train.points_per_micro_batch={self.points_per_micro_batch} "
            f"train.micro_batch_size={self.micro_batch_size} {self._recomputation}\n"
            f"  {self.micro_batches} training forwards of a step, {self.memory.words()}"
        )

    @property
    def _recomputation(self) -> str:
        words = f"model.recompute_granularity={self.model.recompute_granularity}"
        if self.model.recompute_granularity == "selective":
            words += f" model.recompute_modules=[{','.join(self.model.recompute_modules)}]"
        return words


def recomputations(model: ModelConfig) -> list[ModelConfig]:
    """A model with ever more recomputation: nothing, what needs no matrix product, all layers."""
    light = list(LIGHT if model.fp8 is None else LIGHT_IN_FP8)
    none = replace(model, recompute_granularity="none", recompute_modules=["core_attn"], recompute_every=1)
    return [
        none,
        replace(none, recompute_granularity="selective", recompute_modules=light),
        replace(none, recompute_granularity="full"),
    ]


def recommend(
    sizes: Sizes,
    recipe: Recipe,
    data_size: int,
    latent_size: tuple[int, int],
    text_length: int,
    room: int,
) -> MicroBatches | None:
    """The fewest even micro-batches that need at most `room` bytes, None where one point is too much.

    Raises:
        ValueError: a layout that is not possible, or fewer samples than replicas.
    """
    check_replicas(recipe.train.global_batch_size, data_size)
    fallback = None
    for model in recomputations(recipe.model):
        tried = replace(recipe, model=model)
        found = _fewest(sizes, tried, data_size, latent_size, text_length, room)
        if found is not None and found.points_per_micro_batch >= min(FEWEST, points_of(recipe, data_size)):
            return found
        fallback = fallback or found
    return fallback


def _fewest(
    sizes: Sizes,
    recipe: Recipe,
    data_size: int,
    latent_size: tuple[int, int],
    text_length: int,
    room: int,
) -> MicroBatches | None:
    samples = recipe.train.global_batch_size // data_size
    for size in even_sizes(points_of(recipe, data_size), recipe.parallel.pipeline_model_parallel_size):
        asked = asked_at_once(recipe, sizes, samples, size)
        tried = replace(
            recipe, train=replace(recipe.train, points_per_micro_batch=size, micro_batch_size=asked)
        )
        work = workload(tried, data_size, latent_size, text_length, is_told=sizes.guidance_embeds)
        memory = largest_rank(sizes, tried, work, data_size)
        if memory.total <= room:
            return MicroBatches(size, asked, recipe.model, work.micro_batches, memory)
    return None


def asked_at_once(recipe: Recipe, sizes: Sizes, samples: int, points: int) -> int:
    """The most of a replica's samples, without a rest, of which an answer's forward has no more rows than `points`."""
    branches = recipe.stage.asking(sizes.guidance_embeds).forwards().query_branches
    possible = (n for n in range(samples, 0, -1) if samples % n == 0)
    return next(n for n in possible if n == 1 or branches * n <= points)


def even_sizes(points: int, ranks: int) -> Iterator[int]:
    """Points of a forward, from all at once to one; a pipeline wants several forwards for each of its ranks."""
    at_least = 1 if ranks == 1 else min(4 * ranks, points)
    found = [-(-points // count) for count in range(at_least, points + 1)]
    yield from dict.fromkeys(found)
