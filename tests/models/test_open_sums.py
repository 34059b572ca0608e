"""The last sum of a layer, left to the first norm of the next: where, and that it changes nothing."""

import pytest
import torch
from peer import gradient_errors, make_inputs, save_peer

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_weights
from soar_mega.models.common.build import build_model
from soar_mega.models.common.stream import Stream
from soar_mega.models.family import read_sizes
from soar_mega.models.flux.sizes import FluxSizes
from soar_mega.models.sd3.sizes import SD3Sizes

SD3 = SD3Sizes(num_layers=4, dual_attention_layers=(0,))
FLUX = FluxSizes(num_double_layers=3, num_single_layers=2)


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        (SD3, {}, [0, 1, 2]),
        (FLUX, {}, [0, 1]),  # single layers join the streams before their norm
        (SD3, {"recompute_granularity": "selective"}, [0, 1, 2]),
        (SD3, {"recompute_granularity": "full"}, []),
        (SD3, {"recompute_granularity": "full", "recompute_every": 3}, [1]),
    ],
)
def test_where_sums_are_left_open(sizes, settings, expected):
    """Where both layers keep what they compute."""
    built = build_model(sizes, ModelConfig(**settings), ParallelConfig(), meta=True)
    streams = {
        number: [stream.leaves_sum_open for stream in layer.modules() if isinstance(stream, Stream)]
        for number, layer in built.layers.items()
    }
    assert [int(number) for number, leave in streams.items() if any(leave)] == expected
    assert all(all(leave) or not any(leave) for leave in streams.values())


def test_the_next_layer_closes_them(tmp_path, monkeypatch):
    """Through the kernels, which leave each linear's bias open too: as where every layer closes its own."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    save_peer(tmp_path, num_layers=2, dual_attention_layers=(0,))
    sizes = read_sizes(tmp_path)
    inputs = make_inputs(sizes, batch=1)
    calls, velocities, gradients = [], [], []
    for leaves_open in (True, False):
        model = build_model(sizes, ModelConfig(dtype="fp32"), ParallelConfig())
        load_weights(model, tmp_path)
        calls.append(0)
        for stream in (module for module in model.modules() if isinstance(module, Stream)):
            stream.leaves_sum_open &= leaves_open

            def counted(*given, add=stream.gated_add):
                calls[-1] += 1
                return add(*given)

            stream.gated_add = counted
        velocities.append(model(*inputs))
        velocities[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    layers, dual = sizes.num_layers, len(sizes.dual_attention_layers)
    # two streams end each layer but the last, which has the image alone; a second attention needs a sum before it
    assert calls == [1 + dual, 2 * layers - 1 + dual]
    assert torch.equal(*velocities)
    assert max(gradient_errors(*gradients).values()) < 1e-5
