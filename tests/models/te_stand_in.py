"""Transformer Engine as far as layers on a CPU notice it: linears that multiply by what was cast last, FP8 contexts.

What is cast keeps its bits, so a model over the stand-in computes what one over torch's layers does, as long as every
changed weight is cast again.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from soar_mega import layer_checks
from soar_mega.models.common import precision


@dataclass
class Record:
    """What was done."""

    contexts: list[int] = field(default_factory=list)  # the layers they were entered for; -1: all
    casts: list[Any] = field(default_factory=list)  # the linears whose weights were cast
    forwards: list[bool] = field(default_factory=list)  # of linears: whether each was in a context
    recomputed: int = 0  # calls of Transformer Engine's checkpoint
    amaxes: list[Tensor] = field(default_factory=list)  # of each linear: input, weight, output
    enabled: bool = False


class Quantizer:
    """Both forms of a weight are asked for, or the backward would have none."""

    usage: tuple[bool, bool] | None = None

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.usage = rowwise, columnwise


class _Linear:
    """In front of one of megatron's linears, in the form of megatron's TELinear over Transformer Engine's."""

    record: Record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_first_microbatch = True
        self.fuse_wgrad_accumulation = False
        self.form: Any = None
        self.amax = torch.zeros(3)
        self.record.amaxes.append(self.amax)

    def init_fp8_metadata(self) -> None:
        assert self.record.enabled
        self.quantizers = {"scaling_fwd": [None, Quantizer(), None]}

    def get_weight_workspace(self: Any, *, tensor: Tensor, quantizer: Quantizer, cache_name: str) -> None:
        assert tensor is self.weight and quantizer.usage == (True, True) and cache_name == "weight"
        assert not torch.is_grad_enabled()
        self.record.casts.append(self)
        self.form = tensor.clone()
        self.amax[1] = tensor.abs().max()

    def forward(self: Any, x: Tensor) -> tuple[Tensor, None]:
        assert not self.is_first_microbatch
        assert (x.shape[0] * x.shape[1]) % 16 == 0 or not self.record.enabled
        self.record.forwards.append(self.record.enabled)
        weight = self.weight
        if self.record.enabled:
            self.amax[0] = torch.maximum(self.amax[0], x.detach().abs().max().float())
            weight = weight + (self.form - weight).detach()
        if self.fuse_wgrad_accumulation and torch.is_grad_enabled():
            return _AddingLinear.apply(x, weight, self.weight, self.bias), None
        return F.linear(x, weight, self.bias), None


class _AddingLinear(torch.autograd.Function):
    """Adds the gradient of the weight to its main_grad. Like Transformer Engine's it says so on the tensor that was
    saved, and gives autograd what nobody may read, or nothing where that is another tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, form, weight)
        ctx.main_grad = lambda: weight.main_grad  # type: ignore[attr-defined]
        return F.linear(x, form, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, form, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        dummy = None
        if ctx.needs_input_grad[2]:
            ctx.main_grad().add_(rows.t().matmul(x.flatten(0, -2)))
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                dummy = torch.full_like(weight, float("nan"))
        return gradient.matmul(form), None, dummy, rows.sum(0)


def install(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Record:
    """Until the end of a test there is a Transformer Engine, and a GPU that it asks for."""
    record = Record()
    column = type("TEColumn", (_Linear, ColumnParallelLinear), {"record": record})
    row = type("TERow", (_Linear, RowParallelLinear), {"record": record})

    @contextmanager
    def context(config: Any, number: int = -1) -> Iterator[None]:
        record.contexts.append(number)
        before, record.enabled = (
            record.enabled,
            bool(config.fp8) and not is_first_last_bf16_layer(config, number),
        )
        try:
            yield
        finally:
            record.enabled = before

    class State:
        global_amax_buffer = {"forward_x": record.amaxes, "backward_x": [torch.ones(2)]}
        is_fp8_enabled = staticmethod(lambda: record.enabled)
        split_key_in_buffer = staticmethod(lambda key: (key.startswith("forward"), key))

    def checkpoint(function: Any, *args: Any, use_reentrant: bool) -> Any:
        assert record.enabled and not use_reentrant
        record.recomputed += 1
        return function(*args)

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(transformer_engine, "FP8GlobalStateManager", State, raising=False)
    monkeypatch.setattr(TESpecProvider, "column_parallel_linear", lambda self: column)
    monkeypatch.setattr(TESpecProvider, "row_parallel_linear", lambda self: row)
    monkeypatch.setattr(layer_checks, "gpu_capability", lambda: capability)
    monkeypatch.setattr(precision, "get_fp8_context", context)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    distributed: Any = SimpleNamespace(checkpoint=checkpoint)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.distributed", distributed)
    return record
