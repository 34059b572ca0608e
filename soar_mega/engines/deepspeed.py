"""The DeepSpeed engine: any stage over tensor and data parallelism, with ZeRO 0 to 3 and offload to the CPU.

DeepSpeed reduces and partitions; clipping and the decision to step are made here, the same way at every stage.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor
from torch.nn import Parameter

from soar_mega.config import Recipe
from soar_mega.distributed import data_size, device, is_rank_zero
from soar_mega.engines.adam_steps import kept_steps, saved_steps
from soar_mega.engines.engine import Engine, StepResult
from soar_mega.engines.on_demand import OnDemand, without_room
from soar_mega.engines.parameter_groups import learning_rate_factors
from soar_mega.engines.pipeline import Pipeline
from soar_mega.engines.zero import (
    MOMENTS,
    drop_gradients,
    local_gradient,
    main_weights,
    scale_gradient,
    zero_pieces,
)
from soar_mega.models.common.build import build_model
from soar_mega.models.common.gather import partition_dim
from soar_mega.models.common.lora import add_adapters
from soar_mega.models.common.names import global_parameter_names, named_tensors
from soar_mega.models.common.sizes import Sizes
from soar_mega.phases import phases
from soar_mega.private_names import without_shared_memory
from soar_mega.stages.points import Queries

logger = logging.getLogger(__name__)

LARGEST_BUCKET = 5 * 10**8  # elements that are reduced at once; DeepSpeed's default


class ModelParallelUnit:
    """megatron's groups under the names that DeepSpeed asks for."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


class Accumulation(Pipeline):
    """Micro-batch after micro-batch through DeepSpeed's forward and backward; gradients are complete at the last."""

    def averaging(self, micro_batches: int) -> int:
        return data_size()

    def run(
        self,
        forward_step: Callable[[Iterator[Any], Any], tuple[Tensor, Callable[..., Any]]],
        steps: list[Any],
        rows: int,
        latent_size: tuple[int, int],
        text_length: int,
        forward_only: bool = False,
    ) -> None:
        [model] = self.chunks
        iterator = iter(steps)
        for j in range(len(steps)):
            output, finish = forward_step(iterator, model)
            if forward_only:
                finish(output, non_loss_data=True)
                continue
            loss, _ = finish(output)
            model.set_gradient_accumulation_boundary(j == len(steps) - 1)
            model.backward(loss, scale_wrt_gas=False)


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine around the model of this tensor-parallel rank."""

    def __init__(self, recipe: Recipe, config: Sizes) -> None:
        super().__init__(recipe, config)
        self.layout = build_model(config, recipe.model, recipe.parallel, meta=True)
        if recipe.lora.rank:
            add_adapters([self.layout], recipe.lora, recipe.train.seed)
        self._shapes = global_parameter_names(self.layout)
        self._stage = recipe.parallel.zero_stage
        _sum_partial_gradients(self.parameters, self.model.config)
        optimizer = torch.optim.AdamW(_groups(self.parameters, recipe), fused=True)
        [whole] = self.model.chunks
        self._deepspeed = _initialize(whole, optimizer, recipe)
        self.optimizer = optimizer
        self._pieces = zero_pieces(self._deepspeed, self._stage, self.parameters, optimizer.param_groups)
        for piece in self._pieces.values():
            _start_moments(optimizer, piece.owner)
        self._main = main_weights(self._deepspeed, self._stage, self.parameters, self._pieces)
        self._take_exact()
        self._pipeline = Accumulation([self._deepspeed])
        if recipe.train.cuda_graphs != "none" and device().type == "cuda" and is_rank_zero():
            logger.warning(
                "train.cuda_graphs=%s is for parallel.engine=megatron: DeepSpeed does work of its own at each weight, "
                "so the layers run without graphs",
                recipe.train.cuda_graphs,
            )

    def step(self, lr: float) -> StepResult:
        norm = self._gradient_norm()
        if not (math.isfinite(norm) and math.isfinite(self._statistics["loss"])):
            return StepResult(False, norm)
        settings = self.recipe.optimizer
        if settings.clip_grad > 0.0 and norm > settings.clip_grad:
            for name in self._pieces:
                factor = settings.clip_grad / (norm + 1e-6)
                scale_gradient(self._stage, self.parameters[name], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        self._deepspeed.step()
        assert self._deepspeed.was_step_applied()
        self.model.weights_changed()
        return StepResult(True, norm)

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        state = {
            "model": self._wanted_model() if is_loading else self._saved_model(),
            "optimizer": {
                **kept_steps(self.optimizer),
                "param_state_sharding_type": "fully_reshardable",
            },
        }
        if is_loading:
            state["optimizer"]["param_state"] = self._sharded_optimizer()
            return state | {"weights": self._wanted_kept()}
        pieces = []
        for kind in ("param", *MOMENTS):
            parts = {name: self._state(name, kind).view(-1) for name in self._pieces}
            pieces += self._saved_pieces(f"optimizer.state.{kind}", parts)
        return state | {"pieces": pieces + self._saved_weights()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        buffers = dict(self.model.named_buffers())
        for key, tensor in state["model"].items():
            if key in buffers:
                buffers[key].copy_(tensor)
            elif key in self.parameters:
                self._main.set_value(key, tensor.to(device()))
        for key, tensors in state["optimizer"]["param_state"].items():
            for kind, tensor in tensors.items():
                if key in self._pieces:
                    self._state(key, kind).copy_(self._pieces[key].of(tensor))
        for moments in self.optimizer.state.values():
            moments["step"].fill_(saved_steps(state["optimizer"]))
        self._load_kept(state)
        self.model.weights_changed()

    def _sync(self) -> None:
        """A step returns when all parameters are complete."""

    def _askable(self, queries: Queries) -> Queries:
        if self._stage == 3 and not isinstance(queries.unconditional, bool):
            # a forward gathers parameters from all replicas, so all make equally many
            return replace(queries, unconditional=True)
        return queries

    def _clear_gradients(self) -> None:
        drop_gradients(self._deepspeed, self._stage)

    def _gradient(self, name: str) -> Tensor:
        return local_gradient(self._stage, self.parameters[name], self._pieces[name])

    def _gradient_norm(self) -> float:
        """L2 norm over the whole model; parameters that tensor-parallel ranks share count once."""
        total = torch.zeros((), dtype=torch.float64, device=device())
        for name in self._pieces:
            if partition_dim(self.parameters[name]) is not None or _is_first_tensor_rank():
                total += self._gradient(name).double().square().sum().to(device())
        # at stage 0 every data-parallel rank has the whole
        group = parallel_state.get_tensor_model_parallel_group() if self._stage == 0 else dist.group.WORLD
        with phases.waiting():  # the one wait of a step for the device; the statistics come with it
            dist.all_reduce(total, group=group)
            return total.sqrt().item()

    def _state(self, name: str, kind: str) -> Tensor:
        """This rank's flat piece of the main weights (`param`) or of a moment."""
        piece = self._pieces[name]
        return piece.flat if kind == "param" else piece.of_owner(self.optimizer.state[piece.owner][kind])

    def _wanted_model(self) -> OnDemand:
        return OnDemand(self._in_checkpoints(self.layout.sharded_state_dict()))

    def _saved_model(self) -> dict[str, Any]:
        """What is saved of the model."""
        sharded = self._in_checkpoints(self.layout.sharded_state_dict())
        held = named_tensors(self.model)

        def data(name: str) -> Tensor:
            return self._main.value(name).cpu() if name in self.parameters else held[name].cpu()

        return {name: replace(tensor, data=data(name)) for name, tensor in sharded.items()}

    def _sharded_optimizer(self) -> OnDemand:
        """What to load of weights and moments, in the form of megatron's distributed optimizer, fully reshardable."""
        layout = self.layout.sharded_state_dict()

        def wanted(name: str, kind: str) -> Any:
            data = without_room(self._shapes[name])
            return make_sharded_optimizer_tensor(layout[name], data, f"optimizer.state.{kind}")

        trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        return OnDemand(
            {name: {kind: wanted(name, kind) for kind in ("param", *MOMENTS)} for name in trained}
        )


def _is_first_tensor_rank() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0


def _sum_partial_gradients(parameters: dict[str, Parameter], config: Any) -> None:
    """Add up over TP the gradients that each tensor-parallel rank has only a part of, as megatron's finalisation does.

    These are shared parameters that work on shards of the tokens or on some of the heads.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in parameters.items():
        of_tokens = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        of_heads = "q_layernorm" in name or "k_layernorm" in name
        if parameter.requires_grad and (of_tokens or of_heads):
            parameter.register_hook(summed)


def _groups(parameters: dict[str, Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters with the same multipliers, which the groups keep under megatron's names."""
    settings = recipe.optimizer
    factors = learning_rate_factors(parameters, settings)

    def multipliers(name: str) -> tuple[float, float]:
        is_decayed = settings.decay_all or parameters[name].dim() > 1
        return factors.get(name, 1.0), float(is_decayed)

    trained = sorted((name for name, p in parameters.items() if p.requires_grad), key=multipliers)
    return [
        {
            "params": [parameters[name] for name in names],
            "lr": settings.lr,
            "betas": (settings.adam_beta1, settings.adam_beta2),
            "eps": settings.adam_eps,
            "weight_decay": settings.weight_decay * decay,
            "lr_mult": factor,
            "wd_mult": decay,
        }
        for (factor, decay), names in groupby(trained, key=multipliers)
    ]


def _start_moments(optimizer: torch.optim.Optimizer, owner: Tensor) -> None:
    """AdamW's state before the first step, so that it can be saved and loaded at any time."""
    if owner not in optimizer.state:
        step = torch.zeros((), dtype=torch.float32, device=owner.device)
        optimizer.state[owner] = {"step": step, **{kind: torch.zeros_like(owner) for kind in MOMENTS}}


def _initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    without_shared_memory()
    # it insists, also where a single process was started without torchrun
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        mpu=ModelParallelUnit(),
        config=_config(model, recipe),
        dist_init_required=False,
    )
    return engine


def _config(model: torch.nn.Module, recipe: Recipe) -> dict[str, Any]:
    parallel = recipe.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": min(
            LARGEST_BUCKET, sum(p.numel() for p in model.parameters() if p.requires_grad)
        ),
        "stage3_param_persistence_threshold": 0,  # every parameter is cut, so that kept weights can take its place
    }
    on_cpu = {"device": "cpu", "pin_memory": device().type == "cuda"}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = on_cpu
    if parallel.offload_parameters:
        zero["offload_param"] = on_cpu
    is_refused = parallel.zero_stage == 1 and recipe.model.dtype == "bf16"
    if parallel.zero_stage in (1, 2) and not parallel.offload_optimizer and not is_refused:
        zero["compute_grad_norm"] = False  # `step` has it, and has looked at it: the host would wait again
    return {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": recipe.model.dtype == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
