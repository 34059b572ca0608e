"""Context parallelism is there to divide what a forward keeps for its backward."""

import torch
from multirank import run_ranks
from peer import SMALL, make_inputs

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.mmdit import build_model

SIZE, TEXT = (64, 64), 96  # 1024 tokens of the image


def kept_bytes(parallel):
    """Bytes of this rank's tensors that autograd keeps between forward and backward, weights left out."""
    start_world(parallel)
    config = MMDiTConfig(**SMALL | {"pos_embed_max_size": 32})
    model = build_model(config, ModelConfig(dtype="fp32", init="random"), parallel)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = model(*make_inputs(config, SIZE, batch=1, text=TEXT))
    assert velocity.requires_grad  # the graph is alive: no storage was used twice
    return sum(kept.values())


def test_activations_are_divided_by_the_context_parallel_size():
    [whole] = run_ranks(kept_bytes, 1, ParallelConfig())
    share = max(run_ranks(kept_bytes, 4, ParallelConfig(context_parallel_size=4))) / whole
    print(f"a rank of CP 4 keeps {share:.3f} of {whole / 1e6:.1f} MB")
    assert share < 0.3  # conditioning and the velocity are whole on every rank
