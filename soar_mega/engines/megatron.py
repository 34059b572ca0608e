"""The megatron engine: any stage over tensor, sequence, context, pipeline and data parallelism."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor
from torch.nn import Parameter

from soar_mega.config import ModelConfig, Recipe
from soar_mega.distributed import device, is_rank_zero
from soar_mega.engines.adam_steps import agree_on_steps, for_adam, kept_steps, started
from soar_mega.engines.engine import Engine, StepResult
from soar_mega.engines.megatron_weights import gather_parameters, in_lists, main_weights, numbered
from soar_mega.engines.parameter_groups import learning_rate_overrides
from soar_mega.engines.pipeline import Pipeline
from soar_mega.engines.saved_pieces import SavedPiece
from soar_mega.models.common.chunks import ModelChunks
from soar_mega.models.common.layer_graphs import CudaGraphs, Recorder
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.te_layers import add_gradients_in_products
from soar_mega.phases import phases
from soar_mega.private_names import distributed_state

logger = logging.getLogger(__name__)


class MegatronEngine(Engine):
    """Megatron's schedules, DistributedDataParallel and optimizer around this rank's part of the model."""

    def __init__(self, recipe: Recipe, config: Sizes) -> None:
        super().__init__(recipe, config)
        self._ddp = _data_parallel(self.model, recipe)
        self.optimizer = _optimizer(self._ddp, self.parameters, recipe)
        self._main = main_weights(self.parameters, self.optimizer, self._ddp)
        self._take_exact()
        self._pipeline = Pipeline(self._ddp)
        if recipe.model.recompute_granularity != "full":
            add_gradients_in_products(self.model)
        if recipe.train.cuda_graphs == "layers" and device().type == "cuda":
            reason = why_no_graphs(recipe.model)
            if reason is None:
                self.record_layers(CudaGraphs)
            elif is_rank_zero():
                logger.warning("train.cuda_graphs=layers: the layers run without graphs, because %s", reason)

    def record_layers(self, recorder: Callable[[], Recorder]) -> None:
        """Run the layers as graphs from now on, which recompute without torch's checkpoint."""
        for chunk in self._ddp:
            chunk.module.record_layers(partial(_tell, chunk), recorder)
        add_gradients_in_products(self.model)

    def step(self, lr: float) -> StepResult:
        settings = self.recipe.optimizer
        for group in self.optimizer.param_groups:
            # the recipe counts, also after a checkpoint was loaded; megatron leaves the multipliers to its scheduler
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
            group["betas"], group["eps"] = (settings.adam_beta1, settings.adam_beta2), settings.adam_eps
        self.optimizer.prepare_grads()
        with phases.waiting():  # the one wait of a step for the device; the statistics come with it
            norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(norm) and math.isfinite(self._statistics["loss"])):
            return StepResult(False, norm)
        for one in self.optimizer.chained_optimizers:
            if one.get_parameters() and settings.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(one.get_parameters(), settings.clip_grad, norm)
        self.optimizer.step_with_ready_grads()
        self.model.weights_changed()
        return StepResult(True, norm)

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        self._sync()
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self._in_checkpoints(self.model.sharded_state_dict(metadata=metadata))
        if is_loading:
            optimizer = self.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
            return {"model": model, "optimizer": numbered(optimizer), "weights": self._wanted_kept()}
        with started(self.optimizer.chained_optimizers):
            optimizer, pieces = self._saved_optimizer(model, metadata)
        agree_on_steps(optimizer)
        return {"model": model, "optimizer": optimizer, "pieces": pieces + self._saved_weights()}

    def _saved_optimizer(
        self, model: dict[str, Any], metadata: dict[str, Any]
    ) -> tuple[dict[str, Any], list[SavedPiece]]:
        """What megatron saves of its optimizer, without having a rank gather the parts of others."""
        if not self._main.divided:
            return numbered(self.optimizer.sharded_state_dict(model, metadata=metadata)), []
        [distributed] = self.optimizer.chained_optimizers
        states = {name: distributed_state(distributed, self.parameters[name]) for name in self._main.pieces}
        pieces = []
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            parts = {name: state[kind].view(-1) for name, state in states.items()}
            pieces += self._saved_pieces(f"optimizer.state.{kind}", parts)
        sharding_type = metadata["distrib_optim_sharding_type"]
        return kept_steps(distributed.optimizer) | {"param_state_sharding_type": sharding_type}, pieces

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        targets = self.model.sharded_state_dict()
        for key, tensor in state.get("model", {}).items():  # nothing is loaded where a rank has no adapters
            if isinstance(tensor, Tensor):
                targets[key].data.copy_(tensor)
        [optimizer] = self.optimizer.chained_optimizers
        loaded = in_lists(state["optimizer"], len(optimizer.param_groups))
        optimizer.load_state_dict(for_adam(loaded, optimizer.optimizer))
        self._load_kept(state)
        self.model.weights_changed()

    def _clear_gradients(self) -> None:
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _gradient(self, name: str) -> Tensor:
        return self._main.pieces[name].of(self.parameters[name].main_grad)  # type: ignore[attr-defined]

    def _wanted_model(self) -> dict[str, Any]:
        return self._in_checkpoints(self.model.sharded_state_dict())

    def _sync(self) -> None:
        if self.recipe.parallel.overlap_param_gather:
            gather_parameters(self._ddp)


def _data_parallel(model: ModelChunks, recipe: Recipe) -> list[DistributedDataParallel]:
    """A wrapper of its own for each model chunk."""
    parallel = recipe.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    chunks = [
        # one bucket for each chunk but the first: the reduction of the others hides behind the pipeline
        DistributedDataParallel(model.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model.chunks)
    ]
    model.config.finalize_model_grads_func = _finalize_gradients
    # the interleaved schedule would free an output whose message may still be on its way
    model.config.deallocate_pipeline_outputs = len(chunks) == 1
    if parallel.overlap_grad_reduce:
        no_syncs = [chunk.no_sync for chunk in chunks]
        model.config.no_sync_func = no_syncs if len(chunks) > 1 else no_syncs[0]
    return chunks


def why_no_graphs(model: ModelConfig) -> str | None:
    """Why a model's layers cannot be CUDA graphs; None where they can."""
    if model.fp8 and model.fp8_recipe == "delayed":
        return (
            "the histories of model.fp8_recipe=delayed move on between two forwards (tensorwise keeps none)"
        )
    if model.transformer_impl == "transformer_engine" and model.attention_backend in ("auto", "fused"):
        return (
            f"model.attention_backend={model.attention_backend} is cuDNN's attention, whose backward fails in a graph "
            "(sdpa does not)"
        )
    return None


def _tell(ddp: DistributedDataParallel, parameter: Parameter) -> None:
    """A gradient is in its sum: DDP may reduce it, as behind a backward without graphs."""
    if ddp.ddp_config.overlap_grad_reduce:
        ddp.param_to_bucket_group[parameter].register_grad_ready(parameter)


def _finalize_gradients(*args: Any, **kwargs: Any) -> None:
    with phases.waiting():
        finalize_model_grads(*args, **kwargs)


def _optimizer(ddp: list[DistributedDataParallel], parameters: dict[str, Parameter], recipe: Recipe) -> Any:
    settings = recipe.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=recipe.model.dtype == "bf16",
        params_dtype=torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    overrides = {} if settings.decay_all else get_standard_config_overrides(config)
    overrides.update(learning_rate_overrides(parameters, settings))  # type: ignore[arg-type]
    return get_megatron_optimizer(config, ddp, config_overrides=overrides, use_gloo_process_groups=False)
