"""What a checkpoint keeps can be loaded into any other layout, and training goes on as if nothing had happened."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adams import adam
from engine_cases import VPP2, iterate, make_batch, make_recipe, start_engine
from multirank import run_ranks

from soar_mega.checkpoints import reading
from soar_mega.checkpoints.rank_file import save_tensors
from soar_mega.checkpoints.reading import read_tensors
from soar_mega.models.common.gather import full_tensor
from soar_mega.stages import make_stage


def whole(engine, tensors) -> dict[str, torch.Tensor]:
    """This pipeline stage's tensors in the single-process layout."""
    return {name: full_tensor(t, like=engine.parameters[name]).clone() for name, t in tensors.items()}


def ema(engine) -> dict[str, torch.Tensor]:
    return whole(engine, {name: engine.tensors("ema")(name) for name in engine.parameters})


def run(engine, recipe, iterations) -> list[float]:
    stage = make_stage(recipe.stage, shift=1.0)
    return [iterate(engine, stage, make_batch(i))[1].grad_norm for i in iterations]


def save_and_go_on(recipe, folder):
    engine = start_engine(recipe)
    engine.keep_weights("ema")
    run(engine, recipe, range(2))
    save_tensors(engine.sharded_state_dict(), folder)
    return run(engine, recipe, range(2, 4)), ema(engine)


def load_and_go_on(recipe, folder):
    engine = start_engine(recipe)
    with torch.no_grad():
        for parameter in engine.parameters.values():
            parameter.zero_()
    engine.keep_weights("ema")
    reading.READ_AT_ONCE = 2**14  # in several reads, of which the ranks of a pipeline need different numbers
    engine.load_state_dict(read_tensors(Path(folder), engine.sharded_state_dict(is_loading=True)))
    return run(engine, recipe, range(2, 4)), ema(engine)


def with_transformer_engine(function, recipe, folder):
    with adam("transformer_engine"):
        return function(recipe, folder)


def load_weights_alone(recipe, folder, name):
    engine = start_engine(recipe)
    engine.load_weights(read_tensors(Path(folder), engine.weights_state_dict(name)))
    loaded = whole(engine, {n: p.detach() for n, p in engine.parameters.items()})
    main = whole(engine, {n: engine._main.gather(lambda k: engine._main.pieces[k].flat, n) for n in loaded})
    dist.barrier()
    return loaded, main


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    return str(path)


@pytest.mark.slow  # test_train.py has a run that goes on at another layout
@pytest.mark.parametrize(
    "processes, saved, loaded",
    [
        (4, {"layout": (2, 1), "sequence_parallel": True}, {"layout": (1, 2), **VPP2}),
        (2, {"layout": (1, 2), **VPP2}, {"layout": (1, 1)}),
        (2, {"context_parallel_size": 2}, {"layout": (2, 1)}),
        (
            4,
            {"layout": (1, 2), "use_distributed_optimizer": False, **VPP2},
            {"layout": (2, 1), "use_distributed_optimizer": False},
        ),
    ],
    ids=["tp2dp2-to-pp2-vpp2", "pp2-vpp2-to-dp2", "cp2-to-tp2", "plain-optimizer-pp2-vpp2-dp2-to-tp2"],
)
def test_training_goes_on_at_another_layout(folder, processes, saved, loaded):
    before = run_ranks(save_and_go_on, processes, make_recipe(**saved), folder)
    after = run_ranks(load_and_go_on, 2, make_recipe(**loaded), folder)
    assert after[0][0] == pytest.approx(before[0][0], rel=1e-5)
    expected = {name: t for _, ema in before for name, t in ema.items()}
    for _, ema in after:
        for name, tensor in ema.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_distributed_optimizer": False, "model": {"dtype": "bf16"}},
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["plain-bf16", "distributed"],
)
def test_pipeline_ranks_may_train_nothing_of_a_group(folder, settings):
    """The first rank trains nothing, the second one two groups; what is no tensor is of the first rank."""
    frozen = ["pos_embed*", "time_text*", "context_embedder*", "layers.0.*", "layers.1.*"]
    optimizer = {"frozen": frozen, "lr_multipliers": {"layers.3.*": 0.1}}
    recipe = make_recipe((1, 2), optimizer=optimizer, **settings)
    [before, _] = run_ranks(with_transformer_engine, 2, save_and_go_on, recipe, folder)
    [after, _] = run_ranks(with_transformer_engine, 2, load_and_go_on, recipe, folder)
    assert after[0] == before[0]


def test_weights_alone_can_be_loaded(folder):
    recipe = make_recipe((1, 1), train={"global_batch_size": 8})
    run_ranks(save_and_go_on, 2, recipe, folder)
    ema, current = (
        run_ranks(load_weights_alone, 2, make_recipe((1, 2)), folder, name) for name in ("ema", "current")
    )
    for (kept, kept_main), (plain, plain_main) in zip(ema, current, strict=True):
        # two steps of Adam moved the weights by up to 2e-3, and the EMA lags behind
        gap = max((kept[name] - plain[name]).abs().max().item() for name in kept)
        assert 1e-3 < gap < 4e-3
        assert all(kept[n].equal(kept_main[n]) and plain[n].equal(plain_main[n]) for n in kept)
