"""flash-attn 3's operators on a CPU, with the schemas of its hopper/flash_api_stable.cpp."""

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega import layer_checks

FORWARD = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,
Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,
Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None,
Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,
bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None,
int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""
BACKWARD = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None,
Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,
float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1,
float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


class Operators:
    """Attention [B, S, heads, D], written out. `deterministic`: what each backward was asked for."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []
        self.library = torch.library.Library("flash_attn_3", "DEF")
        self.library.define(FORWARD)
        self.library.define(BACKWARD)
        self.library.impl("fwd", self.forward, "CPU")
        self.library.impl("bwd", self.backward, "CPU")

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        given = widened("fwd", args)
        query, key, value, out, scale = (given[name] for name in ("q", "k", "v", "out", "softmax_scale"))
        assert given["num_splits"] == 1
        scores = scale * torch.einsum("bshd,bthd->bhst", query, key)
        out.copy_(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value))
        return out, scores.logsumexp(-1), out.new_empty(0), out.new_empty(0)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        given = widened("bwd", args)
        query, key, value, out, sums = (given[name] for name in ("q", "k", "v", "out", "softmax_lse"))
        gradient, scale = given["dout"], given["softmax_scale"]
        self.deterministic.append(given.get("deterministic", False))  # defaults at the end are left out
        weights = (scale * torch.einsum("bshd,bthd->bhst", query, key) - sums[..., None]).exp()
        by_weight = torch.einsum("bshd,bthd->bhst", gradient, value)
        by_score = scale * weights * (by_weight - (gradient * out).sum(-1).transpose(1, 2)[..., None])
        given["dq"].copy_(torch.einsum("bhst,bthd->bshd", by_score, key))
        given["dk"].copy_(torch.einsum("bhst,bshd->bthd", by_score, query))
        given["dv"].copy_(torch.einsum("bhst,bshd->bthd", weights, gradient))
        return tuple(sums.clone() for _ in range(5))


def widened(operator: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments by their names in the schema; what is read in no less than float32, in which it computes."""
    schema = getattr(torch.ops.flash_attn_3, operator).default._schema
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False))
    written = ("out", "dq", "dk", "dv") if operator == "fwd" else ("dq", "dk", "dv")
    for name, value in given.items():
        if isinstance(value, Tensor):
            assert value.stride(-1) == 1, name
            if name not in written:
                given[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    return given


def install(monkeypatch: pytest.MonkeyPatch, head_sizes: tuple[int, ...] | None = None) -> Operators:
    """As if it were installed, for heads of these sizes (None: it does not say)."""
    config = ModuleType(layer_checks.FLASH_3_CONFIG)
    flags = {
        f"FLASHATTENTION_DISABLE_HDIM{n}": n not in (head_sizes or ())
        for n in layer_checks.FLASH_3_HEAD_SIZES
    }
    config.CONFIG = {"build_flags": flags}  # type: ignore[attr-defined]
    there = {layer_checks.FLASH_3_MODULE, *([layer_checks.FLASH_3_CONFIG] if head_sizes else [])}
    monkeypatch.setattr(layer_checks, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setitem(sys.modules, layer_checks.FLASH_3_CONFIG, config)
    monkeypatch.setitem(sys.modules, layer_checks.FLASH_3_MODULE, ModuleType(layer_checks.FLASH_3_MODULE))
    monkeypatch.setitem(
        sys.modules, layer_checks.FLASH_3_OPERATORS, ModuleType(layer_checks.FLASH_3_OPERATORS)
    )
    operators = registered()
    operators.deterministic.clear()
    return operators


@functools.cache
def registered() -> Operators:
    """A process can register them once."""
    return Operators()
