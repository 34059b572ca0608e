"""A model at a layout against its peer in one process: velocity and every gradient."""

import torch
from multirank import run_ranks
from peer import gradient_errors, relative_error, to_peer_names

from soar_mega.config import ModelConfig
from soar_mega.models.family import read_sizes

SIZE, TEXT = (8, 6), 77  # 12 image tokens and 77 of text: both need padding when they are sharded


def run_layout(folder, parallel, recompute, inputs):
    """Two micro-batches through megatron's schedule -> (velocities, full gradients of this rank's parameters)."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from soar_mega import convert, distributed
    from soar_mega.models.common.build import build_model
    from soar_mega.models.common.gather import full_tensor
    from soar_mega.models.common.names import global_parameter_names

    distributed.start_world(parallel)
    first, last = distributed.is_first_stage(), distributed.is_last_stage()
    settings = ModelConfig(dtype="fp32", recompute_granularity="full" if recompute else "none")
    model = build_model(read_sizes(folder), settings, parallel)
    convert.load_weights(model, folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (recompute and "embed" in name))
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    velocities = []

    def forward_step(iterator, ddp):
        sample = next(iterator)
        part = [x[sample : sample + 1] if first else None for x in inputs]
        output = ddp(*part, latent_size=SIZE, text_length=TEXT)

        def loss(velocity):
            velocities.append(velocity.detach().clone())
            return 2 * (velocity * loss_weights(velocity.shape[1:])[sample]).sum(), {}

        return output, loss

    ddp.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(2)),
        model=[ddp],
        num_microbatches=2,
        seq_length=model.pipeline_sequence_length(SIZE, TEXT),
        micro_batch_size=1,
        forward_only=False,
    )
    names = global_parameter_names(ddp)
    gradients = {n: full_tensor(p.main_grad, like=p) for n, p in names.items() if p.requires_grad}
    return (torch.cat(velocities) if last else None), gradients


def loss_weights(shape):
    """Weights [2, C, H, W] of the output's elements in the loss."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


def check_layout(peer, run_peer, folder, parallel, recompute, inputs):
    """Every rank's velocity and gradients at a layout are those of `run_peer(peer, inputs)`, whose folder this is.

    recompute: of every layer; the embedders are frozen too.
    """
    stage = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    processes = stage * parallel.pipeline_model_parallel_size
    results = run_ranks(run_layout, processes, folder, parallel, recompute, inputs, timeout=100)
    velocity = run_peer(peer, inputs)
    (velocity * loss_weights(velocity.shape[1:])).sum().backward()
    sizes = read_sizes(folder)
    trained = [entry for entry in sizes.family.entries(sizes) if not (recompute and "embed" in entry.name)]
    keys = {key for entry in trained for key in entry.keys}
    theirs = {n: p.grad for n, p in peer.named_parameters() if n in keys}
    for rank in range(0, processes, stage):
        for other in range(rank + 1, rank + stage):
            assert results[other][1].keys() == results[rank][1].keys()
    names = [name for rank in range(0, processes, stage) for name in results[rank][1]]
    assert len(names) == len(set(names))  # each parameter is on one stage
    for place in range(stage):
        ours, ranks = {}, range(place, processes, stage)
        for rank in ranks:
            ours.update(results[rank][1])
        assert relative_error(results[ranks[-1]][0], velocity) < 1e-5
        errors = gradient_errors(to_peer_names(sizes, ours), theirs)
        assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]
