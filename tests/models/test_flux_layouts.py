"""FLUX gives the velocity and every gradient of diffusers at every layout, wherever the pipeline is cut."""

import pytest
from flux_peer import make_inputs, run_peer, save_peer
from layout_runs import SIZE, TEXT, check_layout

from soar_mega.config import ParallelConfig
from soar_mega.models.family import read_sizes


@pytest.mark.parametrize(
    ("layers", "recompute", "layout"),
    [
        # the first pipeline rank has a double layer and a single one
        ((1, 3), True, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
        ((1, 2), False, {"context": 2}),
        ((3, 2), False, {"pipeline": 4}),  # both kinds on the third rank
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((1, 2), False, {"tensor": 2}),
                ((1, 2), False, {"tensor": 2, "sequence_parallel": True}),
                ((1, 1), False, {"tensor": 4, "sequence_parallel": True}),
                ((1, 3), False, {"pipeline": 2}),  # as above
                ((1, 1), False, {"tensor": 2, "context": 2, "sequence_parallel": True}),
                ((1, 2), True, {"pipeline": 2, "context": 2}),
            ]
        ),
    ],
)
def test_layout_equals_diffusers(layers, recompute, layout, tmp_path):
    peer = save_peer(tmp_path, num_layers=layers[0], num_single_layers=layers[1])
    sizes = {f"{kind}_parallel_size": layout.pop(kind, 1) for kind in ("context",)}
    sizes |= {f"{kind}_model_parallel_size": layout.pop(kind, 1) for kind in ("tensor", "pipeline")}
    inputs = make_inputs(read_sizes(tmp_path), SIZE, text=TEXT)
    check_layout(peer, run_peer, tmp_path, ParallelConfig(**sizes, **layout), recompute, inputs)
