"""A checkpoint can be resumed whichever Adam wrote it, and with another learning rate."""

import tempfile
from pathlib import Path

import pytest
import torch
from adams import adam
from engine_cases import iterate, make_batch, make_recipe, start_engine
from multirank import run_ranks

from soar_mega.checkpoints.rank_file import save_tensors
from soar_mega.checkpoints.reading import read_tensors
from soar_mega.stages import SftConfig, make_stage

SFT = SftConfig()
# parameter groups of three kinds
GROUPS = {"decay_all": False, "lr_multipliers": {"layers.0.*": 0.5}, "weight_decay": 0.1}


def in_turns(names: list[str], lrs: list[float], **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One step with each of the Adams, each in an engine that goes on from the checkpoint of the one before."""
    norms, folder = [], None
    for iteration, (name, lr) in enumerate(zip(names, lrs, strict=True)):
        with adam(name):
            engine = start_engine(make_recipe(stage=SFT, optimizer={"lr": lr, **GROUPS}, **settings))
            if folder is not None:
                with torch.no_grad():
                    [parameter.zero_() for parameter in engine.parameters.values()]
                state = engine.sharded_state_dict(is_loading=True)
                engine.load_state_dict(read_tensors(Path(folder.name), state))
            _, result = iterate(engine, make_stage(SFT, shift=1.0), make_batch(iteration), lr)
            norms.append(result.grad_norm)
            folder = tempfile.TemporaryDirectory()
            save_tensors(engine.sharded_state_dict(), folder.name)
    return norms, {name: p.detach().float() for name, p in engine.parameters.items()}


def without_stops(lrs: list[float], **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = start_engine(make_recipe(stage=SFT, optimizer={"lr": lrs[0], **GROUPS}, **settings))
    stage = make_stage(SFT, shift=1.0)
    norms = [iterate(engine, stage, make_batch(i), lr)[1].grad_norm for i, lr in enumerate(lrs)]
    return norms, {name: p.detach().float() for name, p in engine.parameters.items()}


def compare(names: list[str], settings: dict) -> None:
    lrs = [1e-3 / (1 + i % 2) for i in range(len(names))]
    norms, weights = in_turns(names, lrs, **settings)
    expected_norms, expected = without_stops(lrs, **settings)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    # an Adam that has forgotten its steps moves weights by several times the learning rate
    worst = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    assert worst < (1e-2 if settings.get("model") else 1e-5), worst


# each ordered pair once; torch's cannot go on under megatron's distributed optimizer, so it only starts there
TURNS = ["torch", "transformer_engine", "ours", "torch", "ours", "capturable", "transformer_engine", "torch"]


@pytest.mark.parametrize(
    "settings, turns",
    [
        (
            {},
            [
                ["torch", "ours", "transformer_engine", "capturable", "ours"],
                ["torch", "capturable", "transformer_engine"],
            ],
        ),
        pytest.param({"use_distributed_optimizer": False}, [TURNS], marks=pytest.mark.slow),
        ({"use_distributed_optimizer": False, "model": {"dtype": "bf16"}}, [["torch", "ours", "torch"]]),
    ],
    ids=["distributed", "plain", "plain-bf16"],
)
def test_each_adam_goes_on_from_each_other(settings, turns) -> None:
    for names in turns:
        run_ranks(compare, 1, names, settings)
