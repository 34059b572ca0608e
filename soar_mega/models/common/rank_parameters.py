"""The parameters on a rank: how many elements they have, and which of them are trained."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from soar_mega.config import LoraConfig, Recipe
from soar_mega.models.common.flops import ADAPTERS_ALONE, Shares
from soar_mega.models.common.gather import full_shape, partition_dim
from soar_mega.models.common.lora import add_adapters, is_adapter
from soar_mega.models.common.pipeline_layout import rank_layers, stage_layers
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.summary import meta_model

# the weights that are multiplied with each token in the layers
TOKEN_LINEARS = tuple(f".{name}.weight" for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))


class Elements(NamedTuple):
    """Those of one parameter."""

    size: int
    is_trained: bool


class _Whole(NamedTuple):
    """A parameter of the whole model."""

    elements: Elements
    is_cut: bool  # over tensor parallelism


def chunk_parameters(sizes: Sizes, recipe: Recipe, rank: int) -> list[list[Elements]]:
    """Each parameter of each model chunk of a pipeline rank, in the order in which they were made.

    Raises:
        ValueError: a layout that is not possible.
    """
    parallel = recipe.parallel
    stages, tensor = stage_layers(sizes, parallel), parallel.tensor_model_parallel_size
    found = _parts(sizes, *_what_is_trained(recipe))
    chunks = []
    for stage in range(rank, len(stages), parallel.pipeline_model_parallel_size):
        parts = ["embedding"] * (stage == 0) + [str(n) for n in stages[stage]]
        parts += ["output"] * (stage == len(stages) - 1)
        whole = [parameter for part in parts for parameter in found[part]]
        chunks.append([_on_rank(parameter, tensor) for parameter in whole])
    return chunks


def trained_elements(sizes: Sizes, recipe: Recipe, rank: int) -> int:
    """Elements of the trained parameters on one rank of a pipeline rank."""
    return sum(trained(chunk) for chunk in chunk_parameters(sizes, recipe, rank))


def trained(parameters: Iterable[Elements]) -> int:
    """Elements of those that are trained."""
    return sum(parameter.size for parameter in parameters if parameter.is_trained)


def fp8_elements(sizes: Sizes, recipe: Recipe, rank: int) -> int:
    """Of the weights on one rank of a pipeline rank that are multiplied in FP8; with adapters those under them."""
    if recipe.model.fp8 is None:
        return 0
    model, parallel = recipe.model, recipe.parallel
    first, end = 0, sizes.num_layers
    if model.first_last_layers_bf16:
        first, end = model.num_layers_at_start_in_bf16, end - model.num_layers_at_end_in_bf16
    mine = {str(n) for layers in rank_layers(sizes, parallel, rank) for n in layers if first <= n < end}
    return sum(
        _on_rank(parameter, parallel.tensor_model_parallel_size).size
        for name, parameter in _parameters(sizes, 0, (), ()).items()
        if name.endswith(TOKEN_LINEARS) and _part(name) in mine
    )


def trained_linears(sizes: Sizes, recipe: Recipe, number: int) -> frozenset[str]:
    """The names of a layer's linears of which something is trained, an adapter or they themselves: linear_qkv."""
    return _trained_linears(sizes, *_what_is_trained(recipe)).get(str(number), frozenset())


def trained_shares(sizes: Sizes, recipe: Recipe) -> Shares | None:
    """How much of the linears over tokens is trained; None: all of the model is."""
    if recipe.lora.rank:
        return ADAPTERS_ALONE
    if not recipe.optimizer.frozen:
        return None
    weights = {
        name: parameter.elements
        for name, parameter in _parameters(sizes, *_what_is_trained(recipe)).items()
        if name.endswith(TOKEN_LINEARS)
    }

    def share(other: str) -> float:
        mine = [elements for name, elements in weights.items() if f".{other}." not in name]
        return trained(mine) / sum(elements.size for elements in mine)

    return Shares(image=share("text"), text=share("image"))


@cache
def buffer_elements(sizes: Sizes) -> int:
    """Of what is kept with the weights and is no weight; on the first pipeline rank."""
    return sum(buffer.numel() for buffer in meta_model(sizes).buffers())


def _on_rank(parameter: _Whole, tensor: int) -> Elements:
    size, is_trained = parameter.elements
    return Elements(size // tensor if parameter.is_cut else size, is_trained)


def _what_is_trained(recipe: Recipe) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """The rank of adapters, their targets, and what is frozen."""
    return recipe.lora.rank, tuple(recipe.lora.targets), tuple(recipe.optimizer.frozen)


@cache
def _parts(
    sizes: Sizes, lora_rank: int, targets: tuple[str, ...], frozen: tuple[str, ...]
) -> dict[str, tuple[_Whole, ...]]:
    """The parameters of each layer by number, of `embedding` and of `output`."""
    parts: dict[str, list[_Whole]] = {}
    for name, parameter in _parameters(sizes, lora_rank, targets, frozen).items():
        parts.setdefault(_part(name), []).append(parameter)
    return {part: tuple(found) for part, found in parts.items()}


@cache
def _trained_linears(
    sizes: Sizes, lora_rank: int, targets: tuple[str, ...], frozen: tuple[str, ...]
) -> dict[str, frozenset[str]]:
    """Those of each layer by number."""
    linears: dict[str, set[str]] = {}
    for name, parameter in _parameters(sizes, lora_rank, targets, frozen).items():
        if parameter.elements.is_trained:
            linears.setdefault(_part(name), set()).update(
                w for w in name.split(".") if w.startswith("linear")
            )
    return {part: frozenset(found) for part, found in linears.items()}


@cache
def _parameters(
    sizes: Sizes, lora_rank: int, targets: tuple[str, ...], frozen: tuple[str, ...]
) -> dict[str, _Whole]:
    """The parameters of the whole model by name."""
    model = meta_model(sizes)
    if lora_rank:
        add_adapters([model], LoraConfig(rank=lora_rank, targets=list(targets)), seed=0)
    found = {}
    for name, parameter in model.named_parameters():
        is_candidate = is_adapter(name) or not lora_rank
        is_trained = is_candidate and not any(fnmatchcase(name, pattern) for pattern in frozen)
        elements = Elements(full_shape(parameter).numel(), is_trained)
        found[name] = _Whole(elements, partition_dim(parameter) is not None)
    return found


def _part(name: str) -> str:
    head = name.split(".")
    if head[0] == "layers":
        return head[1]
    return "output" if head[0] in ("norm_out", "proj_out") else "embedding"
