"""Gradients of weights are added up in main_grad inside the product, and equal autograd's."""

import pytest
import torch
from multirank import run_ranks
from peer import relative_error

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.models.common import recompute
from soar_mega.models.common.build import transformer_config
from soar_mega.models.common.groups import tensor_parallel_group
from soar_mega.models.common.linear import ColumnLinear, RowLinear, add_bias, linear
from soar_mega.models.sd3.sizes import SD3Sizes

TOKENS, SAMPLES, HIDDEN, WIDE = 4, 2, 8, 12


def steps(call, tensors, micro_batches=2):
    """Gradients by autograd, then with a main_grad that starts at one; both over several micro-batches."""
    generator = torch.Generator().manual_seed(5)
    x = [
        torch.randn(TOKENS, SAMPLES, HIDDEN, generator=generator).to(tensors[0]) for _ in range(micro_batches)
    ]
    results = []
    for with_main_grad in (False, True):
        if with_main_grad:
            tensors[0].main_grad = torch.ones(tensors[0].shape)
            tensors[0].grad_added_to_main_grad = False
        inputs = [part.clone().requires_grad_() for part in x]
        for part in inputs:
            call(part).float().square().sum().backward()
            if with_main_grad:
                assert tensors[0].grad_added_to_main_grad and tensors[0].grad.dtype == tensors[0].dtype
                tensors[0].grad = None  # as megatron's hook does
        found = [part.grad for part in inputs] + [tensor.grad for tensor in tensors[1:]]
        results.append([tensors[0].main_grad - 1 if with_main_grad else tensors[0].grad, *found])
        for tensor in tensors:
            tensor.grad = None
    return results


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_equals_autograd(dtype, bound, recomputed):
    weight = torch.randn(WIDE, HIDDEN, dtype=dtype, requires_grad=True)
    bias = torch.randn(WIDE, dtype=dtype, requires_grad=True)

    def call(x):
        return recompute.run(linear, x, weight, bias) if recomputed else linear(x, weight, bias)

    by_autograd, added_up = steps(call, [weight, bias])
    for mine, theirs in zip(added_up, by_autograd, strict=True):
        assert relative_error(mine, theirs) < bound


def test_nothing_is_added_where_no_gradient_is_asked_for():
    weight = torch.randn(WIDE, HIDDEN, requires_grad=True)
    weight.main_grad = torch.zeros(WIDE, HIDDEN)
    x = torch.randn(TOKENS, SAMPLES, HIDDEN, requires_grad=True)
    linear(x, weight.requires_grad_(False), None).sum().backward()
    assert x.grad is not None and weight.grad is None and not bool(weight.main_grad.any())
    with torch.no_grad():
        assert linear(x, weight.requires_grad_(), None).grad_fn is None


def over_two_ranks(is_sequence_parallel):
    """Errors of a column and a row linear in turn, both without and with main_grad."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=is_sequence_parallel)
    start_world(parallel)
    config = transformer_config(SD3Sizes(), ModelConfig(dtype="fp32"), parallel)
    common = {"config": config, "init_method": None, "bias": True, "skip_bias_add": True}
    common["tp_group"] = tensor_parallel_group()
    column = ColumnLinear(HIDDEN, WIDE, gather_output=False, **common)
    row = RowLinear(WIDE, HIDDEN, input_is_parallel=True, **common)
    for number, tensor in enumerate((column.weight, column.bias, row.weight, row.bias)):
        torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(number))
    errors = []
    for module in (column, row):

        def call(x, module=module):
            hidden = add_bias(*column(x)) if module is column else add_bias(*row(add_bias(*column(x))))
            return hidden.sin()

        by_autograd, added_up = steps(call, [module.weight, module.bias])
        errors += [relative_error(*pair) for pair in zip(added_up, by_autograd, strict=True)]
    return max(errors), len(errors)


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
def test_equals_megatron_over_two_ranks(is_sequence_parallel):
    for error, count in run_ranks(over_two_ranks, 2, is_sequence_parallel):
        assert error < 1e-6 and count == 8
