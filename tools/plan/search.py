"""All layouts of a model on a number of GPUs: which cannot be, which do not fit, and how fast the others should be."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plan.hardware import Hardware
from plan.step_time import StepModel, StepTime
from soar_mega.config import ParallelConfig, Recipe
from soar_mega.gpus import usable_memory
from soar_mega.models.common.flops import Tokens, image_tokens
from soar_mega.models.common.layout import check_layout
from soar_mega.models.common.memory import Memory, Workload, largest_rank, points_of, resting, workload
from soar_mega.models.common.micro_batches import asked_at_once, even_sizes, recomputations
from soar_mega.models.common.sizes import Sizes

TENSOR = (1, 2, 3, 4, 6, 8, 16)
PIPELINE = (1, 2, 3, 4, 6, 8, 12, 16)
CHUNKS = (1, 2, 3)
CONTEXT = (1, 2, 3, 4, 6, 8)
MOST_POINTS = 64  # of a forward, unless all even micro-batches are larger


@dataclass(frozen=True)
class Case:
    """What is planned: the run's recipe, whose layout and micro-batches are open, on so many GPUs."""

    sizes: Sizes
    recipe: Recipe
    gpus: int
    hardware: Hardware
    latent_size: tuple[int, int]
    text_length: int
    gpus_per_node: int = 8

    @property
    def tokens(self) -> Tokens:
        return Tokens(image_tokens(self.sizes, self.latent_size), self.text_length)

    @property
    def room(self) -> float:
        """Bytes of a GPU."""
        return usable_memory(self.hardware.memory)


@dataclass(frozen=True)
class Plan:
    """A layout with its micro-batches, what it takes and how long a step should take."""

    recipe: Recipe
    data_size: int
    memory: Memory
    time: StepTime

    @property
    def samples_per_second(self) -> float:
        return self.recipe.train.global_batch_size / self.time.total


def search(case: Case) -> tuple[list[Plan], Counter[str]]:
    """What can be run, fastest first, and why the rest cannot, with counts."""
    plans: list[Plan] = []
    refused = Counter[str]()
    for parallel in layouts(case, refused):
        plans += _of_layout(case, parallel, refused)
    return sorted(plans, key=lambda plan: plan.time.total), refused


def plan_of(case: Case, recipe: Recipe, data_size: int) -> Plan:
    """What a recipe needs and how fast it should be."""
    return Plan(recipe, data_size, memory_of(case, recipe, data_size), time_of(case, recipe, data_size))


def memory_of(case: Case, recipe: Recipe, data_size: int) -> Memory:
    """Of the rank that needs most."""
    return largest_rank(case.sizes, recipe, work_of(case, recipe, data_size), data_size)


def time_of(case: Case, recipe: Recipe, data_size: int) -> StepTime:
    """Of a step."""
    return _step_model(case, recipe, data_size).step(work_of(case, recipe, data_size))


def _step_model(case: Case, recipe: Recipe, data_size: int) -> StepModel:
    return StepModel(case.sizes, recipe, case.hardware, data_size, case.gpus_per_node, case.tokens)


def work_of(case: Case, recipe: Recipe, data_size: int) -> Workload:
    """The share of a replica."""
    told = case.sizes.guidance_embeds
    return workload(recipe, data_size, case.latent_size, case.text_length, is_told=told)


def layouts(case: Case, refused: Counter[str]) -> Iterator[ParallelConfig]:
    """The layouts that the model and the number of GPUs allow."""
    for tensor in TENSOR:
        for pipeline in PIPELINE:
            for context in CONTEXT:
                if tensor * pipeline * context > case.gpus:
                    continue
                for parallel in _engines(tensor, pipeline, context):
                    reason = _impossible(case, parallel)
                    if reason:
                        refused[reason] += 1
                    else:
                        yield parallel


def _engines(tensor: int, pipeline: int, context: int) -> Iterator[ParallelConfig]:
    common = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
    for chunks in CHUNKS if pipeline > 1 else (1,):
        yield replace(
            common,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=context,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
    if pipeline == context == 1:
        yield from (replace(common, engine="deepspeed", zero_stage=stage) for stage in (1, 2, 3))


def _impossible(case: Case, parallel: ParallelConfig) -> str | None:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    heads, batch = case.sizes.num_attention_heads, case.recipe.train.global_batch_size
    if heads % tensor:
        return f"heads {heads} not divisible by TP {tensor}"
    if heads % (tensor * context):
        return f"heads {heads} not divisible by TP {tensor} x CP {context}"
    if tensor > case.gpus_per_node:
        return f"TP {tensor} is more than the {case.gpus_per_node} GPUs of a node"
    if case.gpus % (tensor * pipeline * context):
        return f"{case.gpus} GPUs not divisible by TP x PP x CP"
    if batch % (case.gpus // (tensor * pipeline * context)):
        return f"the global batch of {batch} not divisible by the replicas"
    try:
        check_layout(case.sizes, parallel)
    except ValueError:
        return "more (virtual) pipeline stages than layers"
    return None


def _of_layout(case: Case, parallel: ParallelConfig, refused: Counter[str]) -> Iterator[Plan]:
    data_size = case.gpus // parallel.replica_size
    samples = case.recipe.train.global_batch_size // data_size
    points = points_of(case.recipe, data_size)
    possible = list(even_sizes(points, 1))
    chosen = [size for size in possible if size <= MOST_POINTS] or possible[-1:]
    fitting = set[int]()  # sizes that fit with less recomputation, which is faster
    # neither the sizes of micro-batches nor recomputation changes what a rank holds between them
    rests = resting(case.sizes, replace(case.recipe, parallel=parallel), data_size)
    none, light, full = recomputations(case.recipe.model)
    for model in (none, light, replace(full, recompute_every=2), full):
        base = replace(case.recipe, model=model, parallel=parallel)
        times = _step_model(case, base, data_size)  # of all sizes: it knows layers that it has seen
        for size in chosen:
            if size in fitting:
                refused["fit with less recomputation too"] += 1
                continue
            answering = asked_at_once(base, case.sizes, samples, size)
            train = replace(base.train, points_per_micro_batch=size, micro_batch_size=answering)
            recipe = replace(base, train=train)
            work = work_of(case, recipe, data_size)
            memory = largest_rank(case.sizes, recipe, work, data_size, rests)
            if memory.total > case.room:
                refused[f"need more than {case.room / 2**30:.0f} GiB"] += 1
            else:
                fitting.add(size)
                yield Plan(recipe, data_size, memory, times.step(work))
