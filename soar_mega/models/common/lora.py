"""Low-rank adapters (LoRA, arXiv 2106.09685): W x becomes W x + alpha / rank B A x, and A and B alone are trained.

An adapter hangs on one of our linears, whatever made it (megatron, Transformer Engine, torch), and adds to its output.
Where that linear holds several of diffusers' (q, k and v), each of them that is chosen has A and B of its own. Of a
column-parallel linear B is cut like the weight's rows, of a row-parallel one A like its columns; the other factor is
the same on all tensor-parallel ranks. What is communicated is as wide as the rank, not as the model.

Dropout leaves out input features: those of one pair of A and B are drawn once per step, for all tokens and samples of
it, keyed by (seed, position of the step's first sample, pair). PEFT draws them for each token anew, which no layout
would repeat at a bearable price.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module, Parameter

from soar_mega.config import LORA_TARGETS, LoraConfig
from soar_mega.flow import uniform
from soar_mega.models.common.gather import full_shape, local_shard, partition_dim
from soar_mega.models.common.groups import tensor_parallel_group
from soar_mega.models.common.initialize import generator_of
from soar_mega.models.common.tensor_map import Entry, parts
from soar_mega.models.common.transformer import Transformer

CHILD = "lora"  # an adapter's name below its linear
STREAM = "lora/dropout"


@dataclass(frozen=True)
class Pair:
    """A and B of one of diffusers' linears.

    Attributes:
        module: diffusers' name of the linear.
        linear: our linear that holds it; part: its name there.
        number: among all pairs of the model.
        shape: [out, in] of its weight.
    """

    module: str
    linear: str
    part: str
    number: int
    shape: tuple[int, int]

    def entries(self, rank: int) -> tuple[Entry, Entry]:
        """A and B as entries of a table of tensors; the keys are PEFT's, without a prefix."""
        rows, columns = self.shape
        ours = f"{self.linear}.{CHILD}.{self.part}"
        return (
            Entry(f"{ours}_A", (f"{self.module}.lora_A.weight",), (rank, columns)),
            Entry(f"{ours}_B", (f"{self.module}.lora_B.weight",), (rows, rank)),
        )


def adapter_pairs(table: Sequence[Entry], targets: Sequence[str]) -> list[Pair]:
    """The pairs of a model, in the order of its table.

    A linear that is cut into several of ours by its columns takes no adapter.

    Args:
        table: the model's tensors.
        targets: patterns (fnmatch) over diffusers' names of linears, as *.attn.to_q.

    Raises:
        ValueError: a pattern that matches no linear.
    """
    weights = [entry for entry in table if entry.name.endswith(".weight") and len(entry.shape) == 2]
    linears = {
        key.removesuffix(".weight"): entry for entry in weights if entry.columns is None for key in entry.keys
    }
    in_parts = {
        key.removesuffix(".weight") for entry in weights if entry.columns is not None for key in entry.keys
    }
    for target in targets:
        # of the published ones some are not in every model: one layer alone has no to_add_out
        if target in LORA_TARGETS or any(fnmatchcase(module, target) for module in linears):
            continue
        if found := sorted(module for module in in_parts if fnmatchcase(module, target)):
            raise ValueError(
                f"lora.targets: {found[0]} is computed in two parts and takes no adapter here. Adapters that have one "
                "can be put into the weights: soar-mega convert PIPELINE OUT --lora ADAPTERS"
            )
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", module) for module in linears)
        raise ValueError(
            f"lora.targets: {target!r} matches no linear of this model. A target is a pattern over diffusers' "
            f"names, in which * stands for anything: {', '.join(kinds)}"
        )
    wanted = [module for module in linears if any(fnmatchcase(module, target) for target in targets)]
    return [
        Pair(
            module=module,
            linear=linears[module].name.removesuffix(".weight"),
            part=_part(module),
            number=number,
            shape=(linears[module].shape[0], linears[module].shape[1]),
        )
        for number, module in enumerate(wanted)
    ]


def _part(module: str) -> str:
    """The last word of a name, with the number that may follow: to_q, to_out_0."""
    words = module.split(".")
    return "_".join(words[-2:] if words[-1].isdigit() else words[-1:])


class Adapter(Module):
    """All pairs of one of our linears.

    Args:
        linear: that it will hang on, of which it reads the shapes.
        entry: the linear's weight in the table of the model's tensors.
        pairs: in the order of the entry's keys.
        heads: of attention on this rank.
        switch: one number on the device, 1 or 0: by it A x is multiplied.
    """

    def __init__(
        self,
        linear: Module,
        entry: Entry,
        pairs: Sequence[Pair],
        config: LoraConfig,
        heads: int,
        switch: Tensor,
    ) -> None:
        super().__init__()
        weight = linear.weight
        assert isinstance(weight, Tensor)
        self.pairs, self.scale, self.switch = pairs, scale(config), switch
        self.cut = partition_dim(weight)
        self.sequence_parallel = self.cut is not None and linear.config.sequence_parallel  # type: ignore[union-attr]
        self.kept: Tensor | None = None  # [pairs, in] of a training step with dropout: 1 or 0
        self.dropout = config.dropout
        rows, columns = weight.shape
        self._rows = rows // len(entry.keys)  # of one part
        modules = [pair.module for pair in pairs]
        self._places = [
            modules.index(key) if key in modules else None
            for key in (key.removesuffix(".weight") for key in entry.keys)
        ]
        self._order = _row_order(entry, rows, heads, weight.device)
        works_on_shards = self.sequence_parallel or getattr(weight, "sequence_parallel", False)
        for pair in pairs:
            for name, shape, dim in (
                ("A", (config.rank, columns), 1),
                ("B", (self._rows, config.rank), 0),
            ):
                factor = Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
                if self.cut == dim:
                    set_tensor_model_parallel_attributes(factor, True, dim, 1)
                else:
                    # under SP it works on this rank's tokens: its gradients are added up over TP
                    factor.sequence_parallel = works_on_shards  # type: ignore[attr-defined]
                self.register_parameter(f"{pair.part}_{name}", factor)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """This rank's input [..., in] and output [..., out] of the linear -> the output with the adapter's."""
        drops = self.kept is not None and torch.is_grad_enabled()
        factors = dict(self.named_parameters())
        down, up = self._down(factors, drops), self._up(factors)
        inner = F.linear(x, down)  # [..., pairs x rank]
        group = tensor_parallel_group()
        if group is not None and group.size() > 1 and self.cut is not None:
            inner = (self._before_rows if self.cut == 0 else self._behind_columns)(inner)
        inner = inner * self.switch
        weight = self.scale / (1.0 - self.dropout) if drops else self.scale
        added = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=weight)
        return added.view_as(output)

    def delta(self, value: Callable[[str], Tensor]) -> Tensor:
        """What the adapter adds to the linear's weight on this rank, float32, for factors of these values by name."""
        factors = {name: value(name).float() for name, _ in self.named_parameters()}
        return self.scale * self._up(factors).matmul(self._down(factors, drops=False))

    def _down(self, factors: Mapping[str, Tensor], drops: bool) -> Tensor:
        """A of all pairs [pairs x rank, in]."""
        found = [factors[f"{pair.part}_A"] for pair in self.pairs]
        if drops:
            assert self.kept is not None
            found = [factor * kept for factor, kept in zip(found, self.kept, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _up(self, factors: Mapping[str, Tensor]) -> Tensor:
        """B of all pairs [out, pairs x rank]: zeros but where a row meets its own pair."""
        found = [factors[f"{pair.part}_B"] for pair in self.pairs]
        if self._order is None:
            return found[0]
        blocks = [
            found[0].new_empty(self._rows, 0) if place is None else found[place] for place in self._places
        ]
        return torch.block_diag(*blocks).index_select(0, self._order)

    def _before_rows(self, inner: Tensor) -> Tensor:
        """A x as the rows of B that this rank has need it: of all tokens; each rank's gradient is a part of it."""
        group = tensor_parallel_group()
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(inner, group=group)

    def _behind_columns(self, inner: Tensor) -> Tensor:
        """A x from what each rank's columns of A have made of it."""
        group = tensor_parallel_group()
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=group)
        return reduce_from_tensor_model_parallel_region(inner, group=group)


def alpha(config: LoraConfig) -> float:
    """lora.alpha, or what it is by default."""
    return float(config.rank) if config.alpha is None else config.alpha


def scale(config: LoraConfig) -> float:
    """What B A x is multiplied by."""
    return alpha(config) / config.rank


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return f".{CHILD}." in name


def _row_order(entry: Entry, rows: int, heads: int, device: torch.device) -> Tensor | None:
    """Where in the parts, one after the other, each row of the linear is; None where there is one part."""
    if len(entry.keys) == 1:
        return None
    places = [place.flatten() for place in parts(torch.arange(rows, device="cpu"), entry, heads)]
    return torch.cat(places).argsort().to(device)


class Adapters:
    """The adapters in a rank's part of a model.

    Attributes:
        pairs: of the whole model.
        members: this rank's adapters by our linear.
        names: global ones of this rank's factors.
    """

    def __init__(self, pairs: list[Pair], members: Mapping[str, Adapter], switch: Tensor) -> None:
        self.pairs, self.members = pairs, members
        self.names = [
            f"{linear}.{CHILD}.{name}"
            for linear, one in members.items()
            for name, _ in one.named_parameters()
        ]
        self._switch = switch
        self._is_on = True
        self._widths: dict[int, list[Adapter]] = {}
        for one in members.values():
            self._widths.setdefault(_width(one), []).append(one)
        device = switch.device
        self._numbers = {
            width: torch.tensor([pair.number for one in those for pair in one.pairs], device=device)
            for width, those in self._widths.items()
        }

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """A context with adapters or without: then the model is the one that they were added to. May be nested."""
        before = self._is_on
        self._switch_to(on)
        try:
            yield
        finally:
            self._switch_to(before)

    def _switch_to(self, on: bool) -> None:
        self._is_on = on
        self._switch.fill_(float(on))  # recorded layers read it where it lies

    def merged(self, value: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """This rank's tensors by global name, with the adapters in the weights that they hang on.

        Args:
            value: the tensors as they are, base weights and factors.
        """

        def merged(name: str) -> Tensor:
            linear, _, kind = name.rpartition(".")
            if kind != "weight" or linear not in self.members:
                return value(name)
            delta = self.members[linear].delta(lambda factor: value(f"{linear}.{CHILD}.{factor}"))
            return value(name).float() + delta

        return merged

    @torch.no_grad()
    def drop(self, seed: int, position: int) -> None:
        """Draw the input features that training leaves out in a step. Nothing waits for the device.

        Args:
            position: of the global batch's first sample in the training sequence, the same on all ranks.
        """
        for width, those in self._widths.items():
            numbers = self._numbers[width]
            drawn = uniform(seed, STREAM, torch.full_like(numbers, position), numbers, width)
            for one, mine in zip(those, drawn.split([len(one.pairs) for one in those]), strict=True):
                kept = (mine >= one.dropout).to(self._switch.dtype)
                if one.cut == 1:
                    group = tensor_parallel_group()
                    kept = kept if group is None else kept.chunk(group.size(), dim=1)[group.rank()]
                if one.kept is None:
                    one.kept = torch.empty_like(kept)
                one.kept.copy_(kept)


def _width(adapter: Adapter) -> int:
    """Input features in the single-process layout."""
    return adapter.pairs[0].shape[1]


def add_adapters(chunks: Sequence[Transformer], config: LoraConfig, seed: int) -> Adapters:
    """Hang adapters on the linears of a rank's part of a model; A is drawn as PEFT does, B is zero.

    A is keyed by (seed, name): the same at every layout.

    Args:
        chunks: on their device.

    Raises:
        ValueError: a target that matches nothing.
    """
    sizes, group = chunks[0].sizes, tensor_parallel_group()
    # by what cuts the weights: that is the running group, also of a model that is built on meta as if for one process
    heads = sizes.num_attention_heads // (1 if group is None else group.size())
    table = sizes.family.entries(sizes)
    pairs = adapter_pairs(table, config.targets)
    weights = {entry.name: entry for entry in table}
    device = next(chunks[0].parameters()).device
    dtype = next(chunks[0].parameters()).dtype
    switch = torch.ones((), dtype=dtype, device=device)
    members = {}
    for chunk in chunks:
        linears = dict(chunk.named_modules())
        for name in dict.fromkeys(pair.linear for pair in pairs):
            if name in linears:
                mine = [pair for pair in pairs if pair.linear == name]
                adapter = Adapter(linears[name], weights[f"{name}.weight"], mine, config, heads, switch)
                _initialize(adapter, name, seed)
                linears[name].add_module(CHILD, adapter)
                linears[name].register_forward_hook(_adapted)
                members[name] = adapter
    return Adapters(pairs, members, switch)


def _adapted(
    linear: Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor | None]
) -> object:
    """A linear's output, or output and the bias that is left to add, with its adapter's."""
    adapter = linear.get_submodule(CHILD)
    if isinstance(output, Tensor):
        return adapter(inputs[0], output)
    return adapter(inputs[0], output[0]), output[1]


@torch.no_grad()
def _initialize(adapter: Adapter, linear: str, seed: int) -> None:
    for name, factor in adapter.named_parameters():
        if name.endswith("_B"):
            factor.zero_()
        elif factor.device.type != "meta":
            full = torch.empty(full_shape(factor), device="cpu")
            bound = 1.0 / math.sqrt(full.shape[1])  # kaiming_uniform_ with a = sqrt(5)
            full.uniform_(-bound, bound, generator=generator_of(seed, f"{linear}.{CHILD}.{name}"))
            factor.copy_(local_shard(full, factor))
