"""Sharded state and gathered tensors: names and full shapes do not depend on the layout."""

import torch
from multirank import run_ranks
from peer import SMALL

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.models.common.build import build_model
from soar_mega.models.common.gather import full_tensor, local_shard, partition_dim
from soar_mega.models.common.names import global_parameter_names, named_tensors
from soar_mega.models.sd3.model import MMDiT
from soar_mega.models.sd3.sizes import SD3Sizes


def random_model(parallel):

    start_world(parallel)
    settings = ModelConfig(dtype="fp32", init="random")
    return build_model(SD3Sizes(**SMALL), settings, parallel, seed=7)


def save_at(parallel, folder):
    """Save a model sharded -> its full parameters."""
    from megatron.core import dist_checkpointing

    model = random_model(parallel)
    dist_checkpointing.save(model.sharded_state_dict(prefix="model."), folder)
    names = global_parameter_names(model)
    assert all(torch.equal(local_shard(full_tensor(p), p), p) for p in names.values())
    return {name: full_tensor(p) for name, p in names.items()}


def test_state_of_tp2_pp2_loads_into_one_process(tmp_path):
    from megatron.core import dist_checkpointing

    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    results = run_ranks(save_at, 4, parallel, str(tmp_path), timeout=100)
    model = random_model(ParallelConfig())
    expected = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    # random weights are keyed by name: each rank holds its part of the single-process ones
    gathered = {**results[0], **results[2]}
    assert gathered.keys() == global_parameter_names(model).keys()
    assert all(torch.equal(gathered[name], expected[name]) for name in gathered)

    with torch.no_grad():
        for tensor in named_tensors(model).values():
            tensor.zero_()
    loaded = dist_checkpointing.load(model.sharded_state_dict(prefix="model."), str(tmp_path))
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in loaded.items()})
    for name, tensor in named_tensors(model).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_linear_of_torch_is_whole_whatever_it_is_called(monkeypatch):
    made = MMDiT.make_embedders

    def and_one_more(model):
        made(model)
        model.linear = torch.nn.Linear(4, 4)

    monkeypatch.setattr(MMDiT, "make_embedders", and_one_more)
    model = build_model(SD3Sizes(**SMALL), ModelConfig(dtype="fp32"), ParallelConfig(), meta=True)
    assert partition_dim(model.linear.weight) is None
    assert partition_dim(model.norm_out.linear.weight) == 0
