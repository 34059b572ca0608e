"""Every layout gives the velocity and every gradient of diffusers' model."""

import pytest
from layout_runs import SIZE, TEXT, check_layout
from peer import SMALL, make_inputs, run_peer, save_peer

from soar_mega.config import ParallelConfig
from soar_mega.models.sd3.sizes import SD3Sizes


@pytest.mark.parametrize(
    # with recompute, the embedders are frozen too
    ("tensor", "pipeline", "context", "sequence", "recompute"),
    [
        (2, 1, 1, False, False),
        (2, 1, 1, True, False),
        (4, 1, 1, True, False),
        (1, 2, 1, False, False),
        (1, 4, 1, False, False),
        (2, 2, 1, False, False),
        (2, 2, 1, True, True),
        (1, 1, 2, False, False),
        (1, 1, 4, False, False),
        (2, 1, 2, False, False),
        (2, 1, 2, True, False),
        (1, 2, 2, False, True),
    ],
)
def test_layout_equals_diffusers(tensor, pipeline, context, sequence, recompute, tmp_path):
    peer = save_peer(tmp_path)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        sequence_parallel=sequence,
    )
    inputs = make_inputs(SD3Sizes(**SMALL), SIZE, text=TEXT)
    check_layout(peer, run_peer, tmp_path, parallel, recompute, inputs)
