"""The time of a training step, predicted from the work of each part and what the hardware can do.

A forward or backward of a pipeline stage is the sum of its matrix products (whole waves of tiles), attention,
elementwise kernels (bytes over copy bandwidth) and the collectives of TP and CP, and at least the host's time to ask
for it. A step is the answer pass, the training pass, each stretched by the pipeline's bubble and by its slowest stage,
what of the reduction of gradients and the gathering of weights is not hidden, and the optimizer.
"""

import math
from dataclasses import astuple, dataclass
from functools import cache, cached_property
from typing import NamedTuple

from plan.hardware import Hardware
from soar_mega.config import Recipe
from soar_mega.models.common.flops import Tokens
from soar_mega.models.common.layout import is_sequence_parallel
from soar_mega.models.common.memory import ITEM, Workload, has_graphs, is_recomputed
from soar_mega.models.common.pipeline_layout import chunks_per_rank, stage_layers
from soar_mega.models.common.rank_parameters import trained_elements
from soar_mega.models.common.sizes import Sizes

# H per token that elementwise kernels read and write: adaLN twice, q, k and v into one tensor, GELU, the gated sum,
# which takes one less each way where the next layer closes it
FORWARD_TRAFFIC, BACKWARD_TRAFFIC = 23, 49
# and for the second attention of a layer, on the image alone
DUAL_FORWARD_TRAFFIC, DUAL_BACKWARD_TRAFFIC = 11, 20
# where they are made again: norms, activations, and q, k and v; and of the second attention
AGAIN_TRAFFIC = {"layernorm": 4, "mlp_act": 8, "qk_layernorm": 6}
DUAL_AGAIN_TRAFFIC = {"layernorm": 2, "qk_layernorm": 6}
MODULES = 14  # of a layer that have parameters


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the critical path."""

    answers: float
    training: float
    bubble: float  # of both passes
    reduction: float  # gradients and weights over data parallelism, as far as nothing hides it
    optimizer: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


class LayerParts(NamedTuple):
    """What a layer is made of, where layers differ.

    image_attentions: 2 with a second one of the image alone. text_goes_on: False where the text stops at its q, k and
    v. modulation: vectors of the hidden size that the conditioning is made into.
    """

    image_attentions: int
    text_goes_on: bool
    modulation: int


@cache
def layer_parts(sizes: Sizes, number: int) -> LayerParts:
    """Read off a layer's work on one token of each stream: an attention's linears are 4 hidden^2, an MLP's 8."""
    work, square = sizes.family.layer_work(sizes, number, Tokens(1, 1)), 2 * sizes.hidden_size**2
    return LayerParts(work.image // square // 4 - 2, work.text // square == 12, work.conditioning // square)


class StepModel:
    """Times of a recipe's parts on some hardware.

    Args:
        data_size: replicas.
        gpus_per_node: how many share the fast link.
    """

    def __init__(
        self,
        sizes: Sizes,
        recipe: Recipe,
        hardware: Hardware,
        data_size: int,
        gpus_per_node: int,
        tokens: Tokens,
    ) -> None:
        self.sizes, self.recipe, self.hardware, self.tokens = sizes, recipe, hardware, tokens
        self.data_size, self.gpus_per_node = data_size, gpus_per_node
        parallel = recipe.parallel
        self.tensor = parallel.tensor_model_parallel_size
        self.context = parallel.context_parallel_size
        self.ranks = parallel.pipeline_model_parallel_size
        self.chunks = chunks_per_rank(parallel)
        self.gpus = self.tensor * self.context * self.ranks * data_size
        self.item = ITEM[recipe.model.dtype]
        self._known: dict[tuple[LayerParts, int, bool], float] = {}
        stages = stage_layers(sizes, parallel)
        self.layers = [
            [n for stage in stages[rank :: self.ranks] for n in stage] for rank in range(self.ranks)
        ]

    def step(self, work: Workload) -> StepTime:
        """The whole step."""
        forward = max(self._rank(rank, work.points, backward=False) for rank in range(self.ranks))
        backward = max(self._rank(rank, work.points, backward=True) for rank in range(self.ranks))
        message = self._message(work.points)
        each = forward + backward + 2 * message
        answer, asked = 0.0, 0
        if work.rows:
            answer = max(self._rank(rank, work.rows, backward=False) for rank in range(self.ranks))
            answer += self._message(work.rows)
            answers = self.recipe.stage.asking(self.sizes.guidance_embeds).forwards().answers
            asked = math.ceil(work.samples * answers / work.rows)
        filling = (self.ranks - 1) / self.chunks
        return StepTime(
            answers=asked * answer,
            training=work.micro_batches * each,
            bubble=filling * (each + (answer if asked else 0.0)),
            reduction=self._reduction(work, forward, backward),
            optimizer=self._optimizer(),
        )

    def _rank(self, rank: int, rows: int, backward: bool) -> float:
        """One forward or backward of all layers of a pipeline rank; embedders and output are a hundredth of a layer."""
        model = self.recipe.model
        total = sum(self._layer(number, rows, backward) for number in self.layers[rank])
        if backward:
            again = [number for number in self.layers[rank] if is_recomputed(model, number)]
            total += sum(self._layer(number, rows, False) for number in again)
        return total

    def _layer(self, number: int, rows: int, backward: bool) -> float:
        parts = layer_parts(self.sizes, number)
        key = (parts, rows, backward)
        if key not in self._known:
            device = self._products(*key) + self._attention(number, rows, backward)
            if backward and "core_attn" in self.recipe.model.made_again:
                device += self._attention(number, rows, backward=False)
            device += self._elementwise(*key) + self._collectives(*key)
            hosts = self.hardware.layer_host_graphs if has_graphs(self.recipe) else self.hardware.layer_host
            host = hosts[backward]
            self._known[key] = max(device, host)
        return self._known[key]

    @cached_property
    def elements(self) -> int:
        """Of the trained parameters, on the rank that has most."""
        return max(trained_elements(self.sizes, self.recipe, rank) for rank in range(self.ranks))

    def _products(self, parts: LayerParts, rows: int, backward: bool) -> float:
        hidden, tensor = self.sizes.hidden_size, self.tensor
        shapes: list[tuple[float, int, float]] = []  # (tokens, in, out)
        for stream, length in enumerate((self.tokens.text, self.tokens.image)):
            m = rows * length / self.context
            attentions = parts.image_attentions if stream else 1
            shapes += attentions * [(m, hidden, 3 * hidden / tensor)]
            if stream or parts.text_goes_on:
                shapes += attentions * [(m, hidden // tensor, hidden)]
                shapes += [(m, hidden, 4 * hidden / tensor), (m, 4 * hidden // tensor, hidden)]
        has_gradients = backward and not self.recipe.lora.rank  # adapters' own products are a hundredth
        total = sum(self.gemm(m, n, k) if backward else self.gemm(m, k, n) for m, k, n in shapes)
        if has_gradients:
            total += sum(self.gemm(n, m, k) for m, k, n in shapes)
        # adaLN: one vector per sample; its weights are read
        weights = self.item * parts.modulation * hidden**2 / tensor
        return total + (2 if has_gradients else 1) * weights / self.hardware.copy

    def gemm(self, m: float, k: float, n: float) -> float:
        """Seconds of a product [m, k] x [k, n]: whole waves of tiles, or its bytes where they take longer."""
        hardware = self.hardware
        rows, columns = hardware.tile
        waves = math.ceil(math.ceil(m / rows) * math.ceil(n / columns) / hardware.units)
        computing = waves * hardware.units * rows * columns * 2 * k / hardware.gemm
        return max(computing, self.item * (m * k + k * n + m * n) / hardware.copy)

    def _attention(self, number: int, rows: int, backward: bool) -> float:
        work = (
            rows
            * self.sizes.family.layer_work(self.sizes, number, self.tokens).attention
            / (self.tensor * self.context)
        )
        speed = self.hardware.attention[backward]
        if self.sizes.attention_head_dim >= 128:
            speed *= self.hardware.attention_128
        return (2 if backward else 1) * work / speed

    def _elementwise(self, parts: LayerParts, rows: int, backward: bool) -> float:
        shards = self.context * (self.tensor if is_sequence_parallel(self.recipe.parallel) else 1)
        again = self.recipe.model.made_again if backward else ()
        each = BACKWARD_TRAFFIC if backward else FORWARD_TRAFFIC
        units = (each + sum(AGAIN_TRAFFIC.get(name, 0) for name in again)) * sum(self.tokens)
        if parts.image_attentions > 1:
            each = DUAL_BACKWARD_TRAFFIC if backward else DUAL_FORWARD_TRAFFIC
            units += (each + sum(DUAL_AGAIN_TRAFFIC.get(name, 0) for name in again)) * self.tokens.image
        return rows * units * self.sizes.hidden_size * self.item / shards / self.hardware.copy

    def _collectives(self, parts: LayerParts, rows: int, backward: bool) -> float:
        """TP: a gather and a scatter for each pair of linears; CP: exchanges before and behind attention."""
        pairs = [(2, self.tokens.text), (1 + parts.image_attentions, self.tokens.image)]
        seconds = 0.0
        for count, length in pairs:
            size = rows * length * self.sizes.hidden_size * self.item / self.context
            # backward gathers the inputs once more for the gradients of weights
            seconds += count * (3 if backward else 2) * self._collective(size, self.tensor, self.tensor)
            if self.context > 1:
                share = 4 * size / self.tensor / self.context  # q, k, v and the result, of this rank's tokens
                span = self.tensor * self.context
                seconds += (count - 1) * 2 * self._collective(share / 2, self.context, span)
        return seconds

    def _collective(self, size: float, ranks: int, span: int) -> float:
        """A gather or scatter of `size` bytes in all over some ranks, which lie within `span` neighbours."""
        if ranks == 1:
            return 0.0
        inside = self._is_inside(span)
        speed = self.hardware.link if inside else self.hardware.network
        latency = self.hardware.link_latency if inside else self.hardware.network_latency
        return _gather(size, ranks, latency, speed)

    def _is_inside(self, span: int) -> bool:
        """Whether all groups of `span` neighbours lie in a node each: the slowest one counts."""
        return self.gpus <= self.gpus_per_node or self.gpus_per_node % span == 0

    def _message(self, rows: int) -> float:
        """One message between pipeline stages; between nodes unless one node is all.

        PP is the outermost: stages of a replica lie TP x CP x DP ranks apart. In several nodes some neighbours are
        always in two of them, and a pipeline goes on when its slowest message has come.
        """
        if self.ranks == 1:
            return 0.0
        shards = self.context * (self.tensor if is_sequence_parallel(self.recipe.parallel) else 1)
        size = rows * (sum(self.tokens) / shards + 1) * self.sizes.hidden_size * self.item
        inside = self.gpus <= self.gpus_per_node
        speed = self.hardware.link if inside else self.hardware.network
        latency = self.hardware.link_latency if inside else self.hardware.network_latency
        return self.chunks * (latency + size / speed)

    def _reduction(self, work: Workload, forward: float, backward: float) -> float:
        parallel = self.recipe.parallel
        replicas = self.data_size * self.context
        if replicas == 1:
            return 0.0
        scatter, gather = (self._over_replicas(size * self.elements, replicas) for size in (4, self.item))
        if parallel.engine == "deepspeed":
            # DeepSpeed reduces at each backward from stage 2 on, and at stage 3 gathers for each forward and backward
            often = work.micro_batches if parallel.zero_stage > 1 else 1
            if parallel.zero_stage < 3:
                # its overlap_comm is on for stage 3 alone, and the engine leaves it so: nothing is hidden
                return often * scatter + gather
            # at stage 3 each module with parameters asks for its own, and waits for the answer's way
            waiting = 2 * often * MODULES * self.sizes.num_layers * self._over_replicas(0, replicas)
            busy = work.micro_batches * (forward + backward)
            return waiting + max(0.0, often * scatter + (2 * often + 1) * gather - busy)
        hidden = backward if parallel.overlap_grad_reduce else 0.0  # behind the last micro-batch
        ahead = forward if parallel.overlap_param_gather else 0.0
        return max(0.0, scatter - hidden) + max(0.0, gather - ahead)

    def _over_replicas(self, size: float, replicas: int) -> float:
        """A reduce-scatter or all-gather: the replicas of a node share its network cards."""
        span = replicas * self.tensor
        if self._is_inside(span):
            return self._collective(size, replicas, span)
        # of all nodes, the one where fewest of a group are
        local = max(1, math.gcd(span, self.gpus_per_node) // self.tensor)
        speed = min(self.hardware.link, local * self.hardware.network)
        return _gather(size, replicas, self.hardware.network_latency, speed)

    def _optimizer(self) -> float:
        parallel = self.recipe.parallel
        is_divided = parallel.engine == "deepspeed" or parallel.use_distributed_optimizer
        share = self.data_size * self.context if is_divided else 1
        return self.elements / share * self.hardware.optimizer / self.hardware.copy


def _gather(size: float, ranks: int, latency: float, speed: float) -> float:
    """`size` bytes in all, in as many steps as the logarithm of the ranks; a scatter takes as long."""
    steps = (ranks - 1).bit_length()
    return steps * latency + size * (ranks - 1) / ranks / speed


def samples_per_second(recipe: Recipe, time: StepTime) -> float:
    return recipe.train.global_batch_size / time.total
