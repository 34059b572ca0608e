"""Counts the kernel launches and the bytes of the SOAR part of a step: query states, point states, losses, gradients.

    python tools/kernel_traffic.py

The engine's own code runs on the meta device, which stands for the GPU: nothing is computed, every call to it is seen.
A torch call counts as one launch that reads its inputs and writes its outputs, a copy from the host as one that
writes; views and allocations are free. A fused operation runs its own launching code, where each Triton launch counts
the tensors of its signature once.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from arguments import positive
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soar_mega.data.batch import Batch
from soar_mega.engines import channel, plan
from soar_mega.engines.branches import branches_of
from soar_mega.engines.channel import Answers
from soar_mega.engines.pipeline import query_states
from soar_mega.engines.statistics import masks_of
from soar_mega.stages import SoarConfig, make_stage
from soar_mega.stages.points import Stage

GPU = torch.device("meta")
# memory is set aside, or a tensor is looked at in another way
FREE = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "detach_",
    "lift_fresh",
)
# these read no more of their input than they write
GATHERS = ("index", "index_select", "gather", "slice", "select")
SOAR_KERNELS = (
    "rollout_renoise_latent_kernel",
    "rollout_renoise_tokens_kernel",
    "correction_loss_kernel",
)


@dataclass
class Traffic:
    """Of one step on one GPU."""

    launches: int = 0
    bytes: int = 0


class Counter(TorchDispatchMode):
    """Counts what reaches the meta device while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Counter":
        for module in modules_that_launch():
            self.patches.enter_context(mock.patch.object(module, "launch", self.launched))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        outputs = func(*args, **kwargs)
        inputs, results = on_gpu((args, kwargs)), on_gpu(outputs)
        if name in FREE or not results:
            return outputs
        written = [x for x in results if not any(same_storage(x, y) for y in inputs)]
        in_place = func._schema.is_mutable
        if written or in_place:
            read = sum(map(size, results if name in GATHERS else inputs))
            self.add(read + sum(map(size, written or results)))
        return outputs

    def launched(self, kernel: Any, grid: Any, device: torch.device, *args: Any, **options: Any) -> None:
        """Stands for `soar_mega.kernels.dispatch.launch`."""
        moved = sum(map(size, on_gpu(args)))
        if kernel.__name__ in SOAR_KERNELS:
            # of v_uncond and v_cond the rows of the samples, in a tensor that holds more
            z0, _, *velocities = args[:4]
            moved -= sum(size(v) - size(z0) for v in on_gpu(velocities))
        self.add(moved)

    def add(self, moved: int) -> None:
        self.traffic.launches += 1
        self.traffic.bytes += moved


def soar_traffic(
    stage: SoarConfig, latent_shape: tuple[int, int, int], batch_size: int, dtype: torch.dtype, points: int
) -> Traffic:
    """Traffic of one step of `batch_size` samples, `points` points per micro-batch, in the form stage.fused_kernels."""
    assert stage.shift is not None
    method = make_stage(stage, stage.shift)
    batch = meta_batch(latent_shape, batch_size)
    with mock.patch.object(plan, "device", lambda: GPU), mock.patch.object(channel, "device", lambda: GPU):
        return _counted(method, plan.place(batch, dtype), dtype, points)


def _counted(method: Stage, placed: plan.PlacedBatch, dtype: torch.dtype, size: int) -> Traffic:
    batch = placed.batch
    queries, answers = method.queries(batch), None
    if queries is not None:
        branches = branches_of(queries, len(batch))
        answers = Answers(branches, batch.latent_shape, None)
        for i in range(branches.count):
            answers.put(i, torch.empty(branches.rows, *batch.latent_shape, device=GPU))
    with Counter() as counter:
        if queries is not None:
            for asked in plan.query_pieces(placed, queries, branches, None, 1):
                query_states(placed, asked, (None, None), queries.fused, dtype)
        points = plan.in_order(method.points(batch))
        made = plan.point_plan(placed, points, masks_of(points), answers, {}, size, 1, first=True, last=True)
        for piece in made.pieces:
            ready = piece.with_sources(placed)
            ready.states(dtype)
            output = torch.empty(size, *batch.latent_shape, device=GPU, requires_grad=True)
            losses, weight = method.loss(ready, output), piece.weight
            assert weight is not None
            (losses * weight.to(losses)).sum().backward()
    return counter.traffic


def both_forms(
    stage: SoarConfig, latent_shape: tuple[int, int, int], batch_size: int, dtype: torch.dtype, points: int
) -> dict[str, Traffic]:
    """The step by plain torch calls and by the kernels."""
    forms = {"eager": False, "fused": True}
    return {
        form: soar_traffic(replace(stage, fused_kernels=fused), latent_shape, batch_size, dtype, points)
        for form, fused in forms.items()
    }


def table(forms: dict[str, Traffic]) -> str:
    """What a person reads."""
    eager, fused = forms["eager"], forms["fused"]
    lines = ["SOAR part of a step (states, losses, gradients), counted:"]
    lines += [f"  {name}: {t.launches:5d} launches, {t.bytes / 2**20:8.1f} MiB" for name, t in forms.items()]
    share = (
        f"{eager.launches / fused.launches:.1f}x fewer launches, {eager.bytes / fused.bytes:.1f}x fewer bytes"
    )
    return "\n".join([*lines, f"  {share}"])


def meta_batch(latent_shape: tuple[int, int, int], size: int) -> Batch:
    """A batch whose latents are on the meta device."""
    return Batch(
        seed=0,
        position=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        latent_shape=latent_shape,
        text_length=1,
        latents=torch.empty(size, *latent_shape, device=GPU),
        text=torch.empty(size, 1, 1, device=GPU),
        pooled=torch.empty(size, 1, device=GPU),
        empty_text=torch.empty(1, 1, device=GPU),
        empty_pooled=torch.empty(1, device=GPU),
    )


def modules_that_launch() -> list[ModuleType]:
    """Where the kernels' launching code looks up `launch`."""
    kernels = [module for name, module in sys.modules.items() if name.startswith("soar_mega.kernels.")]
    return [module for module in kernels if hasattr(module, "launch")]


def on_gpu(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device == GPU]


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def size(tensor: Tensor) -> int:
    """Bytes behind a tensor; an expanded one has fewer than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=positive, default=4, help="samples (default: 4)")
    parser.add_argument("--points", type=int, default=6, help="N, auxiliary points per sample (default: 6)")
    parser.add_argument("--side", type=positive, default=512, help="pixels (default: 512)")
    parser.add_argument("--points-per-micro-batch", type=positive, help="default: all points of the batch")
    args = parser.parse_args()
    stage = SoarConfig(num_auxiliary_points=args.points, shift=3.0)
    latent_shape = (16, args.side // 8, args.side // 8)
    points = args.points_per_micro_batch or args.batch_size * (1 + args.points)
    print(
        f"SD3.5, {args.side} px, {args.batch_size} samples, N = {args.points}, bf16, {points} points per micro-batch"
    )
    print(table(both_forms(stage, latent_shape, args.batch_size, torch.bfloat16, points)))


if __name__ == "__main__":
    main()
