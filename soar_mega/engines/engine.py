"""What every engine is to a training loop: two calls for a step, an update, kept weights, and their state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import Parameter

from soar_mega.config import Recipe
from soar_mega.convert import exact_shards, load_weights
from soar_mega.convert.lora import load_adapters
from soar_mega.data.batch import Batch
from soar_mega.distributed import device
from soar_mega.engines.channel import Answers, make_channel
from soar_mega.engines.on_demand import OnDemand, without_room
from soar_mega.engines.parameter_groups import freeze
from soar_mega.engines.pipeline import (
    Loss,
    Pipeline,
    answer_pass,
    learn_pass,
    measure_pass,
    predict_velocity,
)
from soar_mega.engines.plan import PlacedBatch, PointPlan, in_order, order_of, place, point_plan
from soar_mega.engines.saved_pieces import SavedPiece
from soar_mega.engines.statistics import StepStatistics, masks_of, step_statistics
from soar_mega.engines.weights import KeptWeights, MainWeights, sharded_copy
from soar_mega.flow import TIMESTEPS
from soar_mega.models.common.chunks import ModelChunks, build_chunks
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.fingerprint import fingerprint
from soar_mega.models.common.gather import full_tensor
from soar_mega.models.common.lora import Adapters, add_adapters, is_adapter
from soar_mega.models.common.names import global_parameter_names
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.transformer import Transformer
from soar_mega.phases import phases
from soar_mega.stages.points import Points, Queries
from soar_mega.upload import upload

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """Whether the weights were updated, and the gradient norm before clipping."""

    ok: bool
    grad_norm: float


class Engine(ABC):
    """This rank's part of the model and its optimizer. Every method but `using` is collective over the world.

    Attributes:
        layout: a model of this rank's shapes, the model itself where it always holds them.
        adapters: that are trained in place of the weights, or None; base: then the fingerprint of those weights.
        parameters: by global name.
        weights: the kept copies by name.
        learned: the points of this rank's last batch, and on the last stage the loss of each, [P] float64.
    """

    _main: MainWeights
    _pipeline: Pipeline
    _statistics: StepStatistics

    def __init__(self, recipe: Recipe, config: Sizes) -> None:
        self.recipe = recipe
        self.model = build_chunks(config, recipe.model, recipe.parallel, recipe.train.seed)
        if recipe.model.init == "pretrained":
            load_weights(self.model, recipe.model.pipeline_dir)
        self.layout: Transformer | ModelChunks = self.model
        self.adapters: Adapters | None = None
        self.base: str | None = None
        if recipe.lora.rank:
            self.base = fingerprint(self.model)
            self.adapters = add_adapters(self.model.parts(), recipe.lora, recipe.train.seed)
            if recipe.lora.load:
                load_adapters(self.model, self.adapters, recipe.lora, recipe.lora.load)
        self.parameters: dict[str, Parameter] = global_parameter_names(self.model)
        freeze(self.parameters, recipe.optimizer, is_adapter if self.adapters else lambda name: True)
        self.weights: dict[str, KeptWeights] = {}
        self._told_scale = recipe.stage.guidance_scale if config.guidance_embeds else None
        self._channel = make_channel(recipe.parallel)
        self._placed: PlacedBatch | None = None  # the batch that was answered last
        self.learned: tuple[Points, Tensor | None]

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Clip and update the weights. When the loss or the gradient is not finite, nothing changes."""

    @abstractmethod
    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """All that a checkpoint keeps, for megatron's dist_checkpointing: any layout and any engine can load it.

        To be loaded, what would take much room is an OnDemand. To be saved, the parts of optimizer and kept copies come
        as a list of SavedPiece under `pieces`.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what dist_checkpointing has loaded into `sharded_state_dict(is_loading=True)`."""

    @abstractmethod
    def _clear_gradients(self) -> None: ...

    @abstractmethod
    def _gradient(self, name: str) -> Tensor:
        """The gradient of this rank's piece of a trained parameter, flat, after `learn`."""

    @abstractmethod
    def _sharded_model(self, is_loading: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _sync(self) -> None:
        """Have all parameters complete before they are read outside a forward."""

    @overload
    def answer(
        self, queries: Callable[[Batch], Queries], batch: Batch, weights: str = "current"
    ) -> Answers: ...

    @overload
    def answer(
        self, queries: Callable[[Batch], Queries | None], batch: Batch, weights: str = "current"
    ) -> Answers | None: ...

    def answer(
        self, queries: Callable[[Batch], Queries | None], batch: Batch, weights: str = "current"
    ) -> Answers | None:
        """Predict the velocities that a stage asks for; a lazy handle, whose messages travel while training goes on.

        Several handles may be alive, by different weights. `learn` closes those that it is given; any other is closed
        by whoever asked for it.

        Args:
            weights: current, a name given to `keep_weights`, or with adapters reference: the weights without them.
        """
        placed = self._place(batch)
        asked = queries(placed.batch)
        if asked is None:
            return None
        parallel = self.recipe.parallel
        if (
            parallel.engine == "deepspeed"
            and parallel.zero_stage == 3
            and not isinstance(asked.unconditional, bool)
        ):
            # a forward gathers parameters from all replicas, so all make equally many
            asked = replace(asked, unconditional=True)
        with self.using(weights):
            return answer_pass(
                self._pipeline, self._channel, placed, asked, self.recipe.train.micro_batch_size
            )

    def _place(self, batch: Batch) -> PlacedBatch:
        """The batch on the device; the one of the last call is there already."""
        if self._placed is None or self._placed.given is not batch:
            self._placed = place(batch, self._pipeline.dtype, self._told_scale)
        return self._placed

    def learn(
        self,
        points: Callable[[Batch], Points],
        loss: Loss,
        batch: Batch,
        answers: Answers | None,
        observes: Sequence[str] = (),
        **others: Answers,
    ) -> StepStatistics:
        """Forward and backward: the gradients of sum(weight loss)/D, D the sum of counts over the global batch.

        They do not depend on how the batch is cut into micro-batches, pipeline stages or ranks.

        Args:
            answers: what the rows of the points read: of the query that their `query` says.
            observes: of what the loss puts into `Points.observed`, the names that become statistics.
            others: what the loss reads in `Points.answered`, by name: of the query that their `reads` says.
        """
        train, placed = self.recipe.train, self._place(batch)
        plan = self._plan(placed, in_order(points(placed.batch)), answers, others)
        with phases.waiting():
            dist.all_reduce(plan.total, group=parallel_state.get_data_parallel_group())
        normaliser = torch.where(plan.total == 0, 1.0, plan.total)  # nothing present: all weights are zero
        self._clear_gradients()
        if self.adapters is not None and self.recipe.lora.dropout > 0:
            self.adapters.drop(train.seed, int(placed.batch.position[0]) // train.global_batch_size)
        found = learn_pass(self._pipeline, placed, plan, loss, normaliser, observes)
        self._let_go(answers, *others.values())
        self.learned = plan.points, None if found is None else found[0]
        self._statistics = step_statistics(plan, found, normaliser, observes)
        return self._statistics

    def measure(
        self,
        points: Callable[[Batch], Points],
        function: Loss,
        batch: Batch,
        answers: Answers | None = None,
        **others: Answers,
    ) -> Tensor:
        """A number for each point, from the velocity that `learn` would give a loss: the same to the last bit.

        It is computed in the micro-batches of `learn`, without a gradient; those that are there stay. The dropout of
        adapters, which only counts where there is a gradient, is left out. Closes the handles, as `learn` does.

        Args:
            function: of points and velocity, like a loss: [M].

        Returns:
            [P] float64 on the device, in the order of `points(batch)`, on every rank of the pipeline.
        """
        placed = self._place(batch)
        given = points(placed.batch)
        order = order_of(given)
        plan = self._plan(placed, given.take(order), answers, others)
        values = measure_pass(self._pipeline, placed, plan, function)
        self._let_go(answers, *others.values())
        [place] = upload([order.argsort()], device())
        return values.index_select(0, place)

    def _plan(
        self, placed: PlacedBatch, points: Points, answers: Answers | None, others: Mapping[str, Answers]
    ) -> PointPlan:
        pipeline, train = self._pipeline, self.recipe.train
        return point_plan(
            placed,
            points,
            masks_of(points),
            answers,
            others,
            min(train.points_per_micro_batch or train.micro_batch_size, len(points)),
            pipeline.group,
            first=pipeline.is_first,
            last=pipeline.is_last,
        )

    def _let_go(self, *handles: Answers | None) -> None:
        """Of a batch, and of what was answered about it."""
        for handle in handles:
            if handle is not None:
                handle.close()
        self._placed = None

    @torch.no_grad()
    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        weights: str = "current",
        micro_batch_size: int | None = None,
    ) -> Tensor:
        """Velocity [B, C, H, W] float32 on every rank of the pipeline, for this data-parallel rank's own states.

        A forward may gather parameters from all replicas, so all must make the same number of them: the same number
        of calls, each of at most train.micro_batch_size states, or of the same number of states on all. Shapes may
        differ.

        Args:
            latents: [B, C, H, W]; sigma: [B] in [0, 1]; conditions: [B]. The shapes are read on all ranks, the
                values on the first stage. A guidance-distilled model is told the scale of its training if they name
                none.
            micro_batch_size: most states of a forward; None: twice train.micro_batch_size.
        """
        if self._told_scale is not None and conditions.guidance is None:
            conditions = conditions.told(self._told_scale)
        # an interleaved pipeline would fill up few large micro-batches with empty ones
        most = micro_batch_size or 2 * self.recipe.train.micro_batch_size
        size = min(most, -(-len(latents) // self._pipeline.group))
        with self.using(weights):
            return predict_velocity(self._pipeline, latents, sigma * TIMESTEPS, conditions, size)

    def keep_weights(self, name: str) -> None:
        """Keep a float32 copy of the weights as they are now."""
        assert name != "current" and (name != "reference" or self.adapters is None)
        self._sync()
        self.weights[name] = KeptWeights(self._main, self.recipe.train.offload_kept_weights)

    def blend_weights(self, name: str, decay: float) -> None:
        """Move a kept copy toward the weights as they are now: decay of it and 1 - decay of them."""
        self.weights[name].blend(decay)

    def using(self, name: str) -> AbstractContextManager[None]:
        """A context in which the model computes with the weights kept under `name`.

        With adapters `reference` is the model without them, of which no copy is kept.
        """
        if name == "current":
            return nullcontext()
        if name == "reference" and self.adapters is not None:
            return self.adapters.switched(on=False)
        if name not in self.weights:
            raise ValueError(
                f"no weights are kept under the name {name!r}; kept are {['current', *self.weights]}"
            )
        self._sync()
        return self._swapped_in(name)

    @contextmanager
    def _swapped_in(self, name: str) -> Iterator[None]:
        adapters = nullcontext() if self.adapters is None else self.adapters.switched(on=True)
        with adapters, self.weights[name].swapped_in():
            yield

    def tensors(self, weights: str = "current", exact: bool = False) -> Callable[[str], Tensor]:
        """This rank's shard of a tensor by its global name, as `convert` asks for them one after another.

        A call is collective over the data-parallel group, for what the ranks of it hold in parts is put together then.

        Args:
            exact: in float32 as the optimizer keeps them, not as the model computes with them.
        """
        self._sync()
        held = self._main if weights == "current" else self.weights[weights]
        value = held.exact if exact else held.value
        buffers = dict(self.model.named_buffers())
        return lambda name: buffers[name] if name in buffers else value(name)

    def exported(self, weights: str = "current", exact: bool = False) -> Callable[[str], Tensor]:
        """`tensors` of a model without adapters: those are in the weights."""
        tensors = self.tensors(weights, exact)
        if self.adapters is None:
            return tensors
        return self.adapters.merged(self._on_exact_base(tensors) if exact else tensors)

    def _on_exact_base(self, tensors: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """Tensors by name; those that are not trained come from the pipeline folder, where nothing has rounded them."""
        model = self.recipe.model

        def value(name: str) -> Tensor:
            if model.init == "pretrained" and not is_adapter(name):
                for _, shard in exact_shards(self.layout, model.pipeline_dir, {name}):
                    return shard.to(device())
            return tensors(name)

        return value

    def weights_state_dict(self, name: str) -> dict[str, Any]:
        """What to load from a checkpoint to start from its weights alone: current, or a kept copy such as ema."""
        if name == "current":
            return {"model": self._sharded_model(True)}
        return {"kept": self._sharded_weights(name)}

    @torch.no_grad()
    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over what dist_checkpointing has loaded into `weights_state_dict`."""
        for loaded in state.values():
            for key, tensor in loaded.items():
                if key in self.parameters:
                    self._main.assign(key, tensor.to(device()))
        self.model.weights_changed()

    def _take_exact(self) -> None:
        """Have the main copies hold what the pipeline folder does, where it is float32 and the model rounds it.

        Called by an engine as soon as there are main copies.
        """
        model = self.recipe.model
        if model.init != "pretrained" or model.dtype == "fp32" or self.adapters is not None:
            return
        trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        for name, shard in exact_shards(self.layout, model.pipeline_dir, trained):
            self._main.assign(name, shard.to(device()))

    def gradients(self) -> dict[str, Tensor]:
        """Every trained parameter's float32 gradient after `learn`, whole, in the single-process layout."""
        return self._of_gradients(lambda gradient: gradient.cpu())

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of every trained parameter's gradient after `learn`."""
        return self._of_gradients(lambda gradient: gradient.double().norm().item())

    def _of_gradients(self, wanted: Callable[[Tensor], T]) -> dict[str, T]:
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        mine = {
            name: wanted(full_tensor(self._main.gather(self._gradient, name), like=p))
            for name, p in trained.items()
        }
        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[dict[str, T]] = [{} for _ in range(group.size())]
        dist.all_gather_object(stages, mine, group=group)
        return {name: value for stage in stages for name, value in stage.items()}

    def _sharded_weights(self, name: str) -> OnDemand:
        """What to load of a kept copy."""
        return OnDemand(
            sharded_copy(self._in_checkpoints(self.layout.sharded_state_dict()), name, without_room)
        )

    def _in_checkpoints(self, tensors: dict[str, T]) -> dict[str, T]:
        """What a checkpoint holds of a model, by name: all, or the adapters alone."""
        if self.adapters is None:
            return tensors
        return {name: tensor for name, tensor in tensors.items() if is_adapter(name)}

    def _saved_weights(self) -> list[SavedPiece]:
        """This rank's part of all kept copies; of a frozen parameter the whole, from one rank."""
        if not self.weights:
            return []
        frozen = [key for key, p in self._in_checkpoints(self.parameters).items() if not p.requires_grad]
        wholes = {key: self._main.value(key).float().view(-1) for key in frozen}
        pieces = []
        for name, kept in self.weights.items():
            pieces += self._saved_pieces(f"weights.{name}", kept.still())
            pieces += self._saved_pieces(f"weights.{name}", wholes, divided=False)
        return pieces

    @cached_property
    def _shards(self) -> dict[str, ShardedTensor]:
        """How each tensor of the model is cut, by name; without data."""
        return {t.key: t.without_data() for t in nested_values(self.layout.sharded_state_dict())}

    def _saved_pieces(
        self, prefix: str, parts: Mapping[str, Tensor], divided: bool | None = None
    ) -> list[SavedPiece]:
        """Parts of this rank, flat, by parameter: as pieces of the tensors `prefix`.name of a checkpoint."""
        if divided is None:
            divided = self._main.divided
        pieces = []
        for name, flat in parts.items():
            *model, data = self._shards[name].replica_id
            if any(model) or (data and not divided):
                continue  # another rank has the same
            start = self._main.pieces[name].start if divided else 0
            pieces.append(SavedPiece(f"{prefix}.{name}", flat.detach(), start, self._shards[name]))
        return pieces
