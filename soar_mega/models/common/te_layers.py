"""Transformer Engine's linears and attention, where it is installed."""

import os
from typing import Any

import torch

WEIGHT = 1  # of input, weight, output: the place of a linear's weight among its quantizers

# what Transformer Engine chooses from, by names in the environment
VARIABLES = {"flash": "NVTE_FLASH_ATTN", "fused": "NVTE_FUSED_ATTN", "unfused": "NVTE_UNFUSED_ATTN"}


class CastOnce:
    """Casts its weight to FP8 when it has changed and at no other time; goes in front of megatron's TE linears.

    megatron's schedules have them cast in the first micro-batch of a pass. Where that is one without gradients, of an
    answer pass, they leave out the transposed form, and learning casts everything again. Here both forms are made at
    once, outside of what a CUDA graph captures, and stay at their addresses.
    """

    has_changed = True  # the weight, since it was cast
    fuse_wgrad_accumulation: bool

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., in] -> [..., out] and the bias that is left to add."""
        if self.has_changed:
            self.cast_weight()
        self.is_first_microbatch = False  # as the schedules have set it
        return super().forward(x)  # type: ignore[misc]

    @torch.no_grad()
    def cast_weight(self: Any) -> None:
        """Write the FP8 forms of the weight; nothing outside an FP8 context."""
        from megatron.core.extensions.transformer_engine import FP8GlobalStateManager

        self.has_changed = False
        if not FP8GlobalStateManager.is_fp8_enabled():
            return
        self.init_fp8_metadata()
        quantizer = self.quantizers["scaling_fwd"][WEIGHT]
        quantizer.set_usage(rowwise=True, columnwise=True)
        self.get_weight_workspace(tensor=self.weight, quantizer=quantizer, cache_name="weight")


def add_gradients_in_products(model: torch.nn.Module) -> None:
    """Have each product that makes a weight's gradient add it to the weight's main_grad, which there must be.

    Not where layers are recomputed by torch's checkpoint: Transformer Engine then finds another tensor in the place of
    the weight and gives autograd no gradient, and megatron's DistributedDataParallel never hears of it.
    """
    for module in model.modules():
        if isinstance(module, CastOnce):
            module.fuse_wgrad_accumulation = True


def get_te_provider(attention_backend: str, given_attention: type | None) -> Any:
    """Transformer Engine's modules, with its attention chosen by the environment, or the given one in its place."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    given = TESpecProvider()
    column = type("ColumnLinear", (CastOnce, given.column_parallel_linear()), {})
    row = type("RowLinear", (CastOnce, given.row_parallel_linear()), {})
    attention = given_attention or given.core_attention()
    if given_attention is None:
        for name, variable in VARIABLES.items():
            os.environ[variable] = str(int(attention_backend in ("auto", name)))

    class Provider(TESpecProvider):
        def column_parallel_linear(self) -> type:
            return column

        def row_parallel_linear(self) -> type:
            return row

        def core_attention(self) -> type:
            return attention

    return Provider()
