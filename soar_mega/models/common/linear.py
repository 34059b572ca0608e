"""megatron's parallel linears, whose weights' gradients are added up inside the matrix product.

megatron's DistributedDataParallel gives every parameter a float32 `main_grad`; a gradient of its own would be written,
read and added to it for each micro-batch. Here the product that makes it adds it: megatron's
gradient_accumulation_fusion, without the extension that it needs. Weights without a main_grad (plain torch, DeepSpeed)
and frozen ones keep torch's autograd. On one tensor-parallel rank the bias is added inside the product too, where
megatron's linears would add it in a pass of its own, which costs small models a tenth of their time.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import get_pg_size
from torch import Tensor
from torch.autograd.function import once_differentiable

from soar_mega.kernels.dispatch import launches

# with skip_bias_add the bias is left to the caller, unless it is in already
Output = tuple[Tensor, Tensor | None]


def keeps_input(linear: torch.nn.Module) -> bool:
    """Whether a linear keeps what it reads for its backward: its weight, or an adapter on it, is trained."""
    return any(parameter.requires_grad for parameter in linear.parameters())


class ColumnLinear(ColumnParallelLinear):
    """Output features are cut over TP."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Output:
        """[..., in] -> [..., out / TP] and what is left to add."""
        if get_pg_size(self.tp_group) == 1:
            return linear(input_, self.weight, self.bias), None
        if not accumulates(self.weight):
            return super().forward(input_, *args, **kwargs)
        output = _Linear.apply(input_, self.weight, None, self.tp_group, self.sequence_parallel)
        return output, self.bias


class ColumnLinearBeforeKernel(ColumnLinear):
    """Leaves its bias to the kernel that reads its output, where kernels are launched.

    That costs no pass over the output, and the kernel's backward pass adds up the bias's gradient on its way.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Output:
        """[..., in] -> [..., out / TP] and what is left to add."""
        if get_pg_size(self.tp_group) == 1 and launches(input_.device):
            return linear(input_, self.weight, None), self.bias
        return super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """Input features are cut over TP."""

    def forward(self, input_: Tensor) -> Output:
        """[..., in / TP] -> [..., out] and what is left to add."""
        if get_pg_size(self.tp_group) == 1:
            return linear(input_, self.weight, self.bias), None
        if not accumulates(self.weight):
            return super().forward(input_)
        partial = linear(input_, self.weight, None)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group), self.bias
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), self.bias


class RowLinearBeforeKernel(RowLinear):
    """Leaves its bias to the kernel that reads its output, as above."""

    def forward(self, input_: Tensor) -> Output:
        """[..., in / TP] -> [..., out] and what is left to add."""
        if get_pg_size(self.tp_group) == 1 and launches(input_.device):
            return linear(input_, self.weight, None), self.bias
        return super().forward(input_)


def add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Complete the output of a linear that was built with skip_bias_add."""
    return output if bias is None else output + bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in], transposed, and bias."""
    if accumulates(weight):
        return _Linear.apply(x, weight, bias, None, False)
    return F.linear(x, weight, bias)


def accumulates(weight: Tensor) -> bool:
    """Whether a backward pass will add this weight's gradient to its main_grad."""
    return weight.requires_grad and torch.is_grad_enabled() and getattr(weight, "main_grad", None) is not None


class _Linear(torch.autograd.Function):
    """The weight's gradient goes into its main_grad; autograd gets an empty one, for which megatron's hook is called.

    group: x is whole on each of its ranks, which hold the rows of one matrix, and its gradient is their sum; under
    sequence parallelism x is this rank's tokens of it. None: x and the matrix are this rank's alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
        is_sequence_parallel: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = weight  # what was saved comes back as another tensor where layers are recomputed
        ctx.group, ctx.is_sequence_parallel = group, is_sequence_parallel
        if is_sequence_parallel:
            x, _ = _gather(x, group, wait=True)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # communication is under way while the products are computed
        gathering = reducing = None
        whole = x
        if ctx.is_sequence_parallel:
            whole, gathering = _gather(x, ctx.group, wait=False)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient.matmul(weight)
            if ctx.is_sequence_parallel:
                partial, grad_x = grad_x, torch.empty_like(x)
                reducing = dist.reduce_scatter_tensor(grad_x, partial, group=ctx.group, async_op=True)
            elif ctx.group is not None:
                reducing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        gradient = gradient.reshape(-1, gradient.shape[-1])
        add_product(ctx.parameter.main_grad, gradient, whole.reshape(-1, whole.shape[-1]))
        ctx.parameter.grad_added_to_main_grad = True
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        if reducing is not None:
            reducing.wait()
        return grad_x, torch.empty_like(weight), grad_bias, None, None


def add_product(main_grad: Tensor, gradient: Tensor, x: Tensor) -> None:
    """main_grad [out, in] += gradient [tokens, out], transposed, times x [tokens, in]."""
    if main_grad.dtype == x.dtype:
        main_grad.addmm_(gradient.t(), x)
    elif x.is_cuda:
        torch.addmm(main_grad, gradient.t(), x, out_dtype=main_grad.dtype, out=main_grad)
    else:  # no product of two bf16 matrices on a CPU gives float32
        main_grad.add_(gradient.t().matmul(x))


def _gather(x: Tensor, group: dist.ProcessGroup | None, wait: bool) -> tuple[Tensor, dist.Work | None]:
    """The tokens of all ranks of the group, and what to wait for first."""
    whole = torch.empty(get_pg_size(group) * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)
