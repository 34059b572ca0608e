"""The layers of a model chunk as CUDA graphs: a launch for each layer in place of hundreds.

A graph repeats kernels on fixed addresses. So there is a recording for each shape of the inputs: tensors that the
inputs are copied into, and for each layer one graph of its forward and, where gradients are wanted, one of its
backward, which adds the gradients of the weights to their float32 sums. Layer by layer, because megatron waits for
gathered parameters before a layer and reduces gradients behind one. A pipeline rank has several micro-batches on their
way at once: each of them needs a recording, with memory of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, Parameter

from soar_mega.garbage import garbage_waits
from soar_mega.models.common.answering import is_answering
from soar_mega.models.common.open_sum import Tokens, each, tensors_of
from soar_mega.models.common.precision import cast_weights, run_layer
from soar_mega.private_names import capturing, forward_pre_hooks

Replay = Callable[[], None]
WARM_UP = 2  # runs before a recording: libraries allocate and choose at their first calls


class Recorder(Protocol):
    """Turns work into something that can be repeated at a low price."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work as it will be recorded."""

    def record(self, work: Callable[[], None]) -> Replay:
        """Note down the work without doing it. All recordings of one recorder share their memory."""


class CudaGraphs:
    """A recorder with a stream and a memory pool of its own."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work on the stream of the recordings."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Replay:
        """Record the work as one graph."""
        graph = torch.cuda.CUDAGraph()
        # a recording does not survive the end of another model's graphs
        with torch.cuda.stream(self._stream), capturing(), garbage_waits():
            # other threads (readers of data, the watchdog) may go on calling CUDA
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


class RecordedLayer:
    """A layer over tensors that stay where they are.

    Its weights are stood for by other tensors over the same memory: the gradients of the weights themselves set off
    what DDP and others have hung on them, on streams that know of no recording.

    Attributes:
        outputs: text (None after the model's last layer) and image, after `forward`.
        gradients: of all tensors of text and image and of the conditioning, None where not wanted, after `backward`.
    """

    outputs: list[Tokens | None]
    gradients: list[Tensor | None]

    def __init__(
        self, layer: Module, number: int, recomputed: bool, config: TransformerConfig, lengths: Any
    ) -> None:
        self._layer, self._number, self._config, self._lengths = layer, number, config, lengths
        self.recomputed = recomputed
        self.trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        self._weights = {name: _stand_in(p) for name, p in layer.named_parameters()}
        self._modules = list(layer.modules())
        self._inputs: list[Tokens | None]
        self._results: tuple[Tokens | None, Tokens]

    def forward(self, inputs: Sequence[Tokens | None], learns: bool) -> None:
        """Compute `outputs` of text, image and conditioning; if it `learns`, keep what `backward` needs."""
        self._inputs = [each(_leaf, x) for x in inputs]
        with torch.set_grad_enabled(learns):  # also where it is recomputed: libraries may compute otherwise
            results = self._run()
        if learns and not self.recomputed:
            self._results = results
        self.outputs = [each(_leaf, x) for x in results]

    def backward(self, gradients: list[Tensor | None]) -> None:
        """Compute the gradients of the inputs from those of the outputs, and add those of the weights to main_grad."""
        if self.recomputed:
            with torch.enable_grad():
                self._results = self._run()
        outputs = zip(tensors_of(*self._results), gradients, strict=True)
        pairs = [(out, g) for out, g in outputs if out is not None and g is not None]
        inputs = tensors_of(*self._inputs)
        wanted = {i: x for i, x in enumerate(inputs) if x is not None and x.requires_grad}
        weights = [self._weights[name] for name in self.trained]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [*wanted.values(), *weights],
            [g for _, g in pairs],
            allow_unused=True,
        )
        del self._results
        self.gradients = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=False):
            self.gradients[i] = gradient
        for weight, gradient in zip(weights, found[len(wanted) :], strict=True):
            if gradient is not None and not getattr(weight, "grad_added_to_main_grad", False):
                weight.main_grad.add_(gradient)  # type: ignore[attr-defined]

    def zero_gradients(self) -> list[Tensor | None]:
        """Zeros for `backward`, after `forward`."""
        return [
            torch.zeros_like(x, requires_grad=False) if x is not None and x.requires_grad else None
            for x in tensors_of(*self.outputs)
        ]

    def _run(self) -> tuple[Tokens | None, Tokens]:
        return run_layer(self._call, self._number, self._config, *self._inputs, self._lengths)

    def _call(self, *inputs: Any) -> tuple[Tokens | None, Tokens]:
        return functional_call(self._layer, self._weights, inputs)

    def add_into(self, sums: Mapping[str, Tensor]) -> None:
        """Where gradients of weights are added up from now on, by name."""
        for name, total in sums.items():
            self._weights[name].main_grad = total  # type: ignore[attr-defined]

    def forget(self, outputs: bool, gradients: bool) -> None:
        """Let go of what no replay hands out: its memory is then used for recordings of other shapes too."""
        self._inputs = []
        if outputs:
            del self.outputs
        if gradients:
            self.gradients = []

    def prepare(self) -> None:
        """What comes before a forward and is in no graph: hooks, which wait for weights, and the weights' FP8 forms."""
        for module in self._modules:
            for hook in forward_pre_hooks(module):
                hook(module, ())
        cast_weights(self._modules, self._number, self._config)


class Recording:
    """All layers of a chunk at one shape.

    Args:
        inputs: text [S, B, H], image [S, B, H] and conditioning [B, H], of whose values nothing is read.
        wanted: which of them need a gradient; none: nothing is kept for a backward.
    """

    def __init__(
        self, layers: list[RecordedLayer], inputs: list[Tensor], wanted: list[bool], recorder: Recorder
    ) -> None:
        self._layers, self._wanted = layers, wanted
        self._inputs = [torch.zeros_like(x, requires_grad=False) for x in inputs]
        self._conditioning_gradient = torch.zeros_like(self._inputs[2])
        self._output_gradients: list[Tensor | None] = []
        learns = any(wanted)
        for number in range(len(layers)):
            recorder.warm_up(partial(self._try, number, learns))
        for layer in layers:  # what the warm-ups have left lies outside the graphs' memory
            layer.forget(outputs=True, gradients=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the graphs' memory comes out of what is free
        forward = self._forward if learns else self._forward_alone
        self._forwards = [recorder.record(partial(forward, number)) for number in range(len(layers))]
        self._backwards: list[Replay] = []
        if learns:
            self._output_gradients = layers[-1].zero_gradients()
            self._backwards = [
                recorder.record(partial(self._backward, number)) for number in reversed(range(len(layers)))
            ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Text, image and conditioning after the layers."""
        for fixed, given in zip(self._inputs, inputs, strict=True):
            fixed.copy_(given)
        for layer, replay in zip(self._layers, self._forwards, strict=True):
            layer.prepare()
            replay()
        text, image = tensors_of(*self._layers[-1].outputs)  # the last layer leaves no sum open
        assert image is not None
        return None if text is None else text.detach(), image.detach(), self._inputs[2].detach()

    def backward(
        self,
        ready: Callable[[Parameter], None],
        text: Tensor | None,
        image: Tensor | None,
        conditioning: Tensor | None,
    ) -> list[Tensor | None]:
        """Gradients of the inputs from those of the outputs; `ready` is told of each weight that has its own."""
        for fixed, given in zip(
            [*self._output_gradients, self._conditioning_gradient], (text, image, conditioning), strict=True
        ):
            if fixed is not None and given is not None:
                fixed.copy_(given)
            elif fixed is not None:
                fixed.zero_()
        for layer, replay in zip(reversed(self._layers), self._backwards, strict=True):
            replay()
            for parameter in layer.trained.values():
                ready(parameter)
        text, image, _ = self._layers[0].gradients  # the only ones that are kept
        return [text, image, self._conditioning_gradient if self._wanted[2] else None]

    def _forward(self, number: int) -> None:
        *streams, conditioning = (
            x.detach().requires_grad_(want) for x, want in zip(self._inputs, self._wanted, strict=True)
        )
        before = streams if number == 0 else self._layers[number - 1].outputs
        self._layers[number].forward([*before, conditioning], learns=any(self._wanted))

    def _forward_alone(self, number: int) -> None:
        """With no backward to follow."""
        self._forward(number)
        if number > 0:
            self._layers[number - 1].forget(outputs=True, gradients=False)

    def _backward(self, number: int) -> None:
        layer, is_last = self._layers[number], number + 1 == len(self._layers)
        layer.backward(self._output_gradients if is_last else self._layers[number + 1].gradients[:-1])
        gradient = layer.gradients[-1]
        if gradient is not None:
            self._conditioning_gradient.add_(gradient)
        if not is_last:
            is_next_last = number + 2 == len(self._layers)
            self._layers[number + 1].forget(outputs=not is_next_last, gradients=True)

    def _try(self, number: int, learns: bool) -> None:
        """A layer's work once, with the gradients of its weights going nowhere."""
        self._forward(number)
        if learns:
            layer = self._layers[number]
            sums = {name: p.main_grad for name, p in layer.trained.items()}  # type: ignore[attr-defined]
            layer.add_into({name: torch.empty_like(total) for name, total in sums.items()})
            layer.backward(layer.zero_gradients())
            layer.add_into(sums)


class LayerGraphs:
    """Runs a chunk's layers by their recordings, which it makes when it first sees a shape.

    Args:
        layers: by their number in the model, each with whether it is recomputed in backward.
        ready: told of each weight whose gradient is complete for this micro-batch.
        recorder: makes one for each micro-batch that is on its way at the same time.
    """

    def __init__(
        self,
        layers: Mapping[int, tuple[Module, bool]],
        config: TransformerConfig,
        ready: Callable[[Parameter], None],
        recorder: Callable[[], Recorder],
    ) -> None:
        self._layers, self._config, self._make_recorder = layers, config, recorder
        self.ready = ready
        self._recorders: list[Recorder] = []
        self._made: dict[Any, int] = {}  # recordings of a shape
        self._idle: dict[Any, list[Recording]] = {}

    def run(
        self, text: Tensor, image: Tensor, conditioning: Tensor, lengths: Any
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Text (None after the model's last layer), image and conditioning after the chunk's layers."""
        inputs = [text, image, conditioning]
        wanted = [x.requires_grad and torch.is_grad_enabled() for x in inputs]
        key = (tuple((x.shape, x.dtype) for x in inputs), tuple(wanted), lengths, is_answering())
        idle = self._idle.setdefault(key, [])
        recording = idle.pop() if idle else self._record(key, inputs, wanted, lengths)
        if any(wanted):
            return _Replayed.apply(recording, partial(self._finish, recording, idle), *inputs)
        idle.append(recording)
        return recording.forward(*inputs)

    def _finish(
        self, recording: Recording, idle: list[Recording], *gradients: Tensor | None
    ) -> list[Tensor | None]:
        found = recording.backward(self.ready, *gradients)
        idle.append(recording)
        return found

    def _record(self, key: Any, inputs: list[Tensor], wanted: list[bool], lengths: Any) -> Recording:
        count = self._made[key] = self._made.get(key, 0) + 1
        if count > len(self._recorders):
            self._recorders.append(self._make_recorder())
        layers = [
            RecordedLayer(layer, number, recomputed, self._config, lengths)
            for number, (layer, recomputed) in self._layers.items()
        ]
        return Recording(layers, inputs, wanted, self._recorders[count - 1])


class _Replayed(torch.autograd.Function):
    """A recording's forward and backward as one operation for autograd."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, finish: Callable[..., list[Tensor | None]], *inputs: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        ctx.finish = finish
        ctx.set_materialize_grads(False)
        return recording.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.finish(*gradients)


def _leaf(x: Tensor) -> Tensor:
    """The same tensor as one that autograd begins with."""
    return x.detach().requires_grad_(x.requires_grad)


def _stand_in(parameter: Parameter) -> Tensor:
    """Another tensor over a parameter's memory, with all that is noted on it."""
    stand_in = parameter.detach().requires_grad_(parameter.requires_grad)
    stand_in.__dict__.update(vars(parameter))
    return stand_in
