"""Stand-ins for what megatron-core takes for granted: CUDA calls on a CPU, so that every path runs on gloo, and an Adam
and a gradient norm in the form of apex's and Transformer Engine's where neither is there, on a GPU too.

`install()` is called by the soar-mega process and by the test runner, never by importing the library. All stand-ins of
the project are in this file; tests/test_platform.py switches each one off and expects the failure that makes it
necessary.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw
from torch.utils._device import _device_constructors

Replacement = tuple[Any, str, Any]  # owner, attribute, stand-in

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like")
_CUDA_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


class FusedAdam(torch.optim.Optimizer):
    """AdamW as in apex and Transformer Engine: the step counter lives in the parameter group, not in a tensor's state.

    megatron's distributed optimizer loads its checkpoints only into an optimizer of this shape. The update is
    torch.optim.AdamW's (Loshchilov & Hutter, arXiv 1711.05101), in one fused operation for each group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or capturable:
            raise ValueError(
                "decoupled weight decay (AdamW) outside of a CUDA graph is all there is without Transformer Engine"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            steps_before = group.get("step", 0)
            group["step"] = steps_before + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw(
                params,
                [p.grad for p in params],  # type: ignore[misc]
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # the operation counts up one number for each tensor
                list(torch.full((len(params),), float(steps_before), device=params[0].device).unbind()),
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )


def _current_device() -> list[Replacement]:
    # buffers of sequence parallelism, of pipeline receives and of DDP are made on torch.cuda.current_device()
    return [(torch.cuda, "current_device", lambda: _CPU)]


def _synchronize() -> list[Replacement]:
    # default pipeline p2p and checkpoint saves synchronise the device
    return [(torch.cuda, "synchronize", lambda device=None: None)]


def _current_stream() -> list[Replacement]:
    # megatron-core 0.19 asks for it before it looks whether a gradient has an event to wait for
    return [(torch.cuda, "current_stream", lambda device=None: None)]


def _factories() -> list[Replacement]:
    # schedules and gradient norms write the literal device="cuda"
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return make

    # `with torch.device("meta")` knows the factories by identity and makes its list once: it must hold the real ones,
    # or transformers' loading, which works under it, leaves buffers without values
    _device_constructors()
    return [(torch, name, on_cpu(getattr(torch, name))) for name in _FACTORIES]


def _tensor_type() -> list[Replacement]:
    # the distributed optimizer and clip_grads sort parameters by the name of their CUDA type
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = original(self, dtype, *args, **kwargs) if dtype is not None else original(self)
        return _CUDA_TYPES.get(result, result) if dtype is None else result

    return [(torch.Tensor, "type", type_name)]


def _tensor_cuda() -> list[Replacement]:
    # a fully reshardable save moves gathered optimizer state back with .cuda()
    return [(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)]


def _fused_adam() -> list[Replacement]:
    # with torch's AdamW the distributed optimizer saves checkpoints that it cannot load: `assert len(steps) == 1`
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return []
    return [
        (optimizer, "Adam", FusedAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distributed_optimizer, "Adam", FusedAdam),
        (distributed_optimizer, "HAVE_APEX_OR_TE", True),
        (distributed_optimizer, "USING_APEX_OPTIMIZER", True),
    ]


def _gradient_norm() -> list[Replacement]:
    # megatron's own fallback reads the norm of each tensor from the device, one after the other
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    def l2_norm(chunk: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool) -> Any:
        [gradients] = lists
        return get_total_norm(gradients).view(1), None

    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm:
        return []
    return [(clip_grads, "l2_norm_impl", l2_norm)]


def _parameter_gather() -> list[Replacement]:
    # gloo gathers into a second buffer of the whole size and copies that back, which takes several times as long as to
    # send each rank's part into its place (at once, also where megatron would wait for it later). Over one rank it
    # would still copy the parameters onto themselves, in a thread of its own with a second OpenMP pool: libgomp then
    # counts more threads than cores, puts them to sleep between operations, and training takes half as long again
    import megatron.core.distributed.param_and_grad_buffer as buffers

    def gather_parameters(output: torch.Tensor, shard: torch.Tensor, group: Any, async_op: bool) -> None:
        parts = output.chunk(group.size())
        assert shard.data_ptr() == parts[group.rank()].data_ptr()
        if len(parts) > 1:
            for rank, part in enumerate(parts):
                torch.distributed.broadcast(part, group=group, group_src=rank)

    return [(buffers, "dist_all_gather_func", gather_parameters)]


STAND_INS: dict[str, Callable[[], list[Replacement]]] = {
    "current_device": _current_device,
    "synchronize": _synchronize,
    "current_stream": _current_stream,
    "factories": _factories,
    "tensor_type": _tensor_type,
    "tensor_cuda": _tensor_cuda,
    "fused_adam": _fused_adam,
    "gradient_norm": _gradient_norm,
    "parameter_gather": _parameter_gather,
}
ON_CUDA = ("fused_adam", "gradient_norm")
_installed: dict[str, list[tuple[Replacement, Any]]] = {}  # name -> (replacement, original)


def install() -> None:
    """Put the stand-ins in place, with CUDA only those of ON_CUDA. Does nothing when they are in place already."""
    if _installed:
        return
    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        _hide_transformer_engine()
    for name, replacements in STAND_INS.items():
        if name in ON_CUDA or not on_cuda:
            _put(name, replacements())


def _hide_transformer_engine() -> None:
    """Where it is installed megatron would hand it gradients on the CPU too, and it can compute on a GPU only."""
    if "transformer_engine" not in sys.modules and find_spec("transformer_engine") is not None:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # to an import: not installed


def _put(name: str, replacements: list[Replacement]) -> None:
    _installed[name] = [(r, getattr(r[0], r[1])) for r in replacements]
    for owner, attribute, stand_in in replacements:
        setattr(owner, attribute, stand_in)


@contextmanager
def without(name: str) -> Iterator[None]:
    """Take one stand-in away, to see what fails without it."""
    taken = _installed.pop(name)
    for (owner, attribute, _), original in taken:
        setattr(owner, attribute, original)
    try:
        yield
    finally:
        _put(name, [replacement for replacement, _ in taken])
