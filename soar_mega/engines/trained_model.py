"""The model that an engine trains, as weights: copies that are kept of them, what is exported and what is saved."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import Parameter

from soar_mega.config import Recipe
from soar_mega.convert import exact_shards, load_weights
from soar_mega.convert.adapter_files import load_adapters
from soar_mega.distributed import device
from soar_mega.engines.kept_weights import KeptWeights, MainWeights, sharded_copy
from soar_mega.engines.on_demand import OnDemand, without_room
from soar_mega.engines.parameter_groups import freeze
from soar_mega.engines.saved_pieces import SavedPiece
from soar_mega.models.common.chunks import ModelChunks, build_chunks
from soar_mega.models.common.fingerprint import fingerprint
from soar_mega.models.common.lora import Adapters, add_adapters, is_adapter
from soar_mega.models.common.names import global_parameter_names
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.transformer import Transformer

T = TypeVar("T")


class TrainedModel(ABC):
    """This rank's part of the model, and of the copies of its weights. Every method but `using` is collective.

    An engine says where the weights are: it sets `_main` as soon as it has an optimizer, and calls `_take_exact`.

    Attributes:
        layout: a model of this rank's shapes, the model itself where it always holds them.
        adapters: that are trained in place of the weights, or None; base: then the fingerprint of those weights.
        parameters: by global name.
        weights: the kept copies by name.
    """

    _main: MainWeights

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

    @abstractmethod
    def _wanted_model(self) -> dict[str, Any]:
        """What to load of the model."""

    @abstractmethod
    def _sync(self) -> None:
        """Have all parameters complete before they are read outside a forward."""

    def keep_weights(self, name: str) -> None:
        """Keep a float32 copy of the weights as they are now.

        With adapters `reference` is the model without them, and there is nothing to keep.
        """
        assert name != "current"
        if name == "reference" and self.adapters is not None:
            return
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
            return {"model": self._wanted_model()}
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

    def _sharded_weights(self, name: str) -> OnDemand:
        """What to load of a kept copy."""
        return OnDemand(
            sharded_copy(self._in_checkpoints(self.layout.sharded_state_dict()), name, without_room)
        )

    def _wanted_kept(self) -> dict[str, OnDemand]:
        """What to load of all kept copies, by name."""
        return {name: self._sharded_weights(name) for name in self.weights}

    def _load_kept(self, state: dict[str, Any]) -> None:
        """Take over the kept copies of a loaded state."""
        for name, tensors in state.get("weights", {}).items():  # empty groups are not loaded
            for key, tensor in tensors.items():
                self.weights[name].assign(key, tensor.to(device()))

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
