"""What every engine is to a training loop: two calls for a step, an update, and the state of all of it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.config import Recipe
from soar_mega.data.batch import Batch
from soar_mega.distributed import data_rank, data_size, device
from soar_mega.engines.channel import Answers, make_channel
from soar_mega.engines.pipeline import (
    Loss,
    Pipeline,
    answer_pass,
    learn_pass,
    measure_pass,
    predict_velocity,
)
from soar_mega.engines.plan import PlacedBatch, PointPlan, in_order, order_of, place, point_plan
from soar_mega.engines.statistics import StepStatistics, masks_of, step_statistics
from soar_mega.engines.trained_model import TrainedModel
from soar_mega.flow import TIMESTEPS
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.gather import full_tensor
from soar_mega.models.common.sizes import Sizes
from soar_mega.phases import phases
from soar_mega.stages.points import Points, Queries
from soar_mega.upload import upload

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """Whether the weights were updated, and the gradient norm before clipping."""

    ok: bool
    grad_norm: float


class Engine(TrainedModel):
    """This rank's part of the model and its optimizer. Every method but `using` is collective over the world.

    Attributes:
        learned: the points of this rank's last batch, and on the last stage the loss of each, [P] float64.
    """

    _pipeline: Pipeline
    _statistics: StepStatistics

    def __init__(self, recipe: Recipe, config: Sizes) -> None:
        super().__init__(recipe, config)
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
        size = self.recipe.train.micro_batch_size
        with self.using(weights):
            return answer_pass(self._pipeline, self._channel, placed, self._askable(asked), size)

    def _askable(self, queries: Queries) -> Queries:
        """What the forwards of an engine can ask in place of these."""
        return queries

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
            self.adapters.drop(train.seed, self._first_position(placed.batch))
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

    def _first_position(self, batch: Batch) -> int:
        """Where the global batch begins in the training sequence, from this rank's share of it.

        A number of steps would not do: a run may go on with another global batch, at no multiple of it.
        """
        share = self.recipe.train.global_batch_size // data_size()
        return int(batch.position.min()) - data_rank() * share

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
