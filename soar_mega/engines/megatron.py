"""The megatron engine: any stage over tensor, sequence, pipeline and data parallelism."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
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

from soar_mega.config import Recipe
from soar_mega.convert import load_weights
from soar_mega.data.batch import Batch
from soar_mega.distributed import device, is_first_stage, is_last_stage
from soar_mega.engines.channel import Answers, make_channel
from soar_mega.engines.parameter_groups import freeze, learning_rate_overrides
from soar_mega.engines.pipeline import Loss, Pipeline, answer_pass, in_order, learn_pass, predict_velocity
from soar_mega.engines.statistics import StepStatistics, step_statistics
from soar_mega.engines.weights import KeptWeights, MainWeights, sharded_copy
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.gather import full_tensor
from soar_mega.models.mmdit import build_model
from soar_mega.models.names import global_parameter_names
from soar_mega.stages.points import Points, Queries

TRAINING_TIMESTEPS = 1000  # the model is told 1000 sigma


@dataclass(frozen=True)
class StepResult:
    """Whether the weights were updated, and the gradient norm before clipping."""

    ok: bool
    grad_norm: float


class MegatronEngine:
    """This rank's part of the model and its optimizer. Every method but `using` is collective over the world."""

    def __init__(self, recipe: Recipe, config: MMDiTConfig) -> None:
        self.recipe = recipe
        self.model = build_model(
            config,
            recipe.model,
            recipe.parallel,
            pre_process=is_first_stage(),
            post_process=is_last_stage(),
            seed=recipe.train.seed,
        )
        if recipe.model.init == "pretrained":
            load_weights(self.model, recipe.model.pipeline)
        self.parameters: dict[str, Parameter] = global_parameter_names(self.model)
        freeze(self.parameters, recipe.optimizer)
        self._ddp = _data_parallel(self.model, recipe)
        self.optimizer = _optimizer(self._ddp, self.parameters, recipe)
        self.weights: dict[str, KeptWeights] = {}
        self._main = MainWeights(self.parameters, self.optimizer)
        self._pipeline = Pipeline(self._ddp)
        self._channel = make_channel()
        self._answers: Answers | None = None
        self._loss = 0.0

    def answer(
        self, queries: Callable[[Batch], Queries | None], batch: Batch, weights: str = "current"
    ) -> Answers | None:
        """Predict the velocities that a stage asks for; a lazy handle, whose messages travel while training goes on.

        Args:
            weights: current, or a name given to `keep_weights`.
        """
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        batch = _placed(batch)
        asked = queries(batch)
        if asked is None:
            return None
        size = min(self.recipe.train.micro_batch_size, len(batch))
        with self.using(weights):
            self._answers = answer_pass(self._pipeline, self._channel, batch, asked, size)
        return self._answers

    def learn(
        self, points: Callable[[Batch], Points], loss: Loss, batch: Batch, answers: Answers | None
    ) -> StepStatistics:
        """Forward and backward: the gradients of sum(weight loss)/D, D the sum of counts over the global batch.

        They do not depend on how the batch is cut into micro-batches, stages or ranks.
        """
        batch = _placed(batch)
        mine = in_order(points(batch))
        counts = mine.count.sum().to(device())
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        normaliser = counts.item() or 1.0  # nothing present: all weights are zero
        train = self.recipe.train
        size = min(train.points_per_micro_batch or train.micro_batch_size, len(mine))
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = learn_pass(self._pipeline, batch, answers, mine, loss, normaliser, size)
        if answers is not None:
            answers.close()
            self._answers = None
        statistics = step_statistics(mine, losses, normaliser)
        self._loss = statistics["loss"]
        return statistics

    def step(self, lr: float) -> StepResult:
        """Clip, update the weights and every EMA. When the loss or the gradient is not finite, nothing changes."""
        settings = self.recipe.optimizer
        for group in self.optimizer.param_groups:
            # the recipe counts, also after a checkpoint was loaded; megatron leaves the multipliers to its scheduler
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
            group["betas"], group["eps"] = (settings.adam_beta1, settings.adam_beta2), settings.adam_eps
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(norm) and math.isfinite(self._loss)):
            return StepResult(False, norm)
        for one in self.optimizer.chained_optimizers:
            if one.get_parameters() and settings.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(one.get_parameters(), settings.clip_grad, norm)
        self.optimizer.step_with_ready_grads()
        for kept in self.weights.values():
            kept.update()
        return StepResult(True, norm)

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor, weights: str = "current"
    ) -> Tensor:
        """Velocity [B, C, H, W] float32 on every rank of the pipeline, for this data-parallel rank's own states.

        Args:
            latents: [B, C, H, W]; sigma: [B] in [0, 1]; text: [B, S, D]; pooled: [B, P]. The shapes are read on all
                ranks, the values on the first stage.
        """
        size = min(2 * self.recipe.train.micro_batch_size, len(latents))
        with self.using(weights):
            timestep = sigma * TRAINING_TIMESTEPS
            return predict_velocity(self._pipeline, latents, timestep, text, pooled, size)

    def keep_weights(self, name: str, decay: float | None = None) -> None:
        """Keep a float32 copy of the weights as they are now; with a decay, an EMA that each step updates."""
        assert name != "current"
        self._sync()
        self.weights[name] = KeptWeights(self._main, decay)

    def using(self, name: str) -> AbstractContextManager[None]:
        """A context in which the model computes with the weights kept under `name`."""
        if name == "current":
            return nullcontext()
        if name not in self.weights:
            raise ValueError(
                f"no weights are kept under the name {name!r}; kept are {['current', *self.weights]}"
            )
        self._sync()
        return self.weights[name].swapped_in()

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """All that a checkpoint keeps, for megatron's dist_checkpointing: it can be loaded into any layout."""
        self._sync()
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self.model.sharded_state_dict(metadata=metadata)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
            "weights": {name: self._sharded_weights(name, is_loading) for name in self.weights},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what dist_checkpointing has loaded into `sharded_state_dict(is_loading=True)`."""
        targets = self.model.sharded_state_dict()
        for key, tensor in state["model"].items():
            if isinstance(tensor, Tensor):
                targets[key].data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensors in state["weights"].items():
            for key, tensor in tensors.items():
                self.weights[name].assign(key, tensor.to(device()))

    def weights_state_dict(self, name: str) -> dict[str, Any]:
        """What to load from a checkpoint to start from its weights alone: current, or a kept copy such as ema."""
        return (
            {"model": self.model.sharded_state_dict()}
            if name == "current"
            else {"kept": self._sharded_weights(name, True)}
        )

    @torch.no_grad()
    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over what dist_checkpointing has loaded into `weights_state_dict`."""
        for loaded in state.values():
            for key, tensor in loaded.items():
                if key in self.parameters:
                    self._main.assign(key, tensor.to(device()))

    def gradients(self) -> dict[str, Tensor]:
        """Every trained parameter's float32 gradient after `learn`, whole, in the single-process layout."""

        def part(name: str) -> Tensor:
            return self._main.pieces[name].of(self.parameters[name].main_grad)  # type: ignore[attr-defined]

        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        mine = {name: full_tensor(self._main.gather(part, name), like=p).cpu() for name, p in trained.items()}
        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
        dist.all_gather_object(stages, mine, group=group)
        return {name: gradient for stage in stages for name, gradient in stage.items()}

    def _sharded_weights(self, name: str, is_loading: bool) -> dict[str, Any]:
        names = {id(parameter): key for key, parameter in self.parameters.items()}

        def whole(parameter: Parameter) -> Tensor:
            if is_loading:
                return torch.empty(parameter.shape, dtype=torch.float32)
            return self.weights[name].whole(names[id(parameter)]).cpu()

        return sharded_copy(self.model.sharded_state_dict(), name, whole)

    def _sync(self) -> None:
        """Have all parameters complete before they are read outside a forward."""
        if self.recipe.parallel.overlap_param_gather:
            self._ddp.start_param_sync(force_sync=True)


def _placed(batch: Batch) -> Batch:
    """Positions on the CPU, where rows are made; latents on the device, zero where a sample could not be read."""
    batch = replace(batch, position=batch.position.cpu(), valid=batch.valid.cpu())
    if batch.latents is not None:
        latents = batch.latents.to(device(), torch.float32)
        present = batch.valid.to(device())[:, None, None, None]
        # weight zero times a latent that is not a number would still be one
        batch = replace(batch, latents=torch.where(present, latents, 0.0))
    return batch


def _data_parallel(model: Any, recipe: Recipe) -> DistributedDataParallel:
    parallel = recipe.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    ddp = DistributedDataParallel(config=model.config, ddp_config=config, module=model)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.deallocate_pipeline_outputs = True
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = ddp.no_sync
    return ddp


def _optimizer(ddp: DistributedDataParallel, parameters: dict[str, Parameter], recipe: Recipe) -> Any:
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
    return get_megatron_optimizer(config, [ddp], config_overrides=overrides)
