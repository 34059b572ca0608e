"""One small random model on this process's device against diffusers on the CPU in float64."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peer import gradient_errors, relative_error, to_peer_names

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_weights
from soar_mega.distributed import device, start_world
from soar_mega.models.common.build import build_model
from soar_mega.models.family import read_sizes


def errors(
    peers: ModuleType,
    folder: Path,
    seed: int,
    settings: ModelConfig,
    prepare: Callable[[Any], object] = lambda peer: None,
    **changes: Any,
) -> tuple[float, float]:
    """Relative errors of the velocity and of the worst parameter's gradient.

    Args:
        peers: `peer` or `flux_peer`, which make diffusers' model.
        prepare: called with that before it runs.
        changes: sizes that must hold.
    """
    drawn, size, batch, text = peers.random_case(seed)
    peer = peers.save_peer(folder, seed, **(drawn | changes))
    start_world(ParallelConfig())
    model = build_model(read_sizes(folder), settings, ParallelConfig())
    load_weights(model, folder)
    prepare(peer)
    inputs = peers.make_inputs(model.sizes, size, batch, text)
    ours, theirs = model(*(x.to(device()) for x in inputs)), peers.run_peer(peer, inputs)
    assert ours.device.type == device().type and ours.dtype == torch.float32
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights.to(device())).sum().backward()
    (theirs * weights).sum().backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    wanted = {name: p.grad for name, p in peer.named_parameters()}
    return (
        relative_error(ours.detach().cpu(), theirs),
        max(gradient_errors(to_peer_names(model.sizes, found), wanted).values()),
    )
