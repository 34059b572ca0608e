"""Weights go into files and come out of them tensor by tensor, whatever parts of them a rank holds."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from engine_cases import SIZES, make_recipe, start_engine
from live_bytes import LiveBytes
from multirank import run_ranks
from safetensors.torch import load_file

from soar_mega.checkpoints import reading
from soar_mega.checkpoints.rank_file import save_tensors
from soar_mega.convert import save_folder
from soar_mega.convert.weight_files import SINGLE
from soar_mega.models.common.names import global_parameter_names

WIDE = replace(SIZES, attention_head_dim=32, caption_projection_dim=128)
NOISE = 2**14  # messages between the ranks
LARGEST = 9 * 128 * 128 * 4  # bytes in float32: the nine modulations of a layer
BF16 = {"dtype": "bf16"}
CASES = {  # processes, recipes
    "megatron-tp2-pp2-dp2": (8, [make_recipe((2, 2), model=BF16)]),
    "zero1-2-3-dp2": (2, [make_recipe(model=BF16, engine="deepspeed", zero_stage=n) for n in (1, 2, 3)]),
}


def export(recipes, folder) -> list[int]:
    """Writes weights that are all zero and an EMA that is not -> the most bytes that were held for each."""
    peaks = []
    for number, recipe in enumerate(recipes):
        engine = start_engine(recipe, WIDE)
        engine.keep_weights("ema")
        shapes = global_parameter_names(engine.layout)
        engine.load_weights({"model": {name: torch.zeros(p.shape) for name, p in shapes.items()}})
        for weights in ("current", "ema"):
            with LiveBytes() as live:
                save_folder(
                    engine.model, folder / f"{number}-{weights}", patient(engine.tensors(weights), live)
                )
            peaks.append(live.peak)
    return peaks


def patient(tensors, live):
    """gloo's threads let go of a tensor a moment after they are done with it: wait for that before the next one."""
    deadline = time.monotonic() + 5.0

    def asked(name):
        while live.now > NOISE and time.monotonic() < deadline:
            time.sleep(0.001)
        return tensors(name)

    return asked


def load(recipe, folder, at_once) -> tuple[int, int]:
    """Loads the average, or with DeepSpeed all that a checkpoint holds -> the most bytes held, those of the average."""
    reading.READ_AT_ONCE = at_once
    engine = start_engine(recipe, WIDE)
    engine.keep_weights("ema")
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    save_tensors(engine.sharded_state_dict(), folder)
    kept = {name: piece.clone() for name, piece in engine.weights["ema"].pieces.items()}
    everything = engine.sharded_state_dict(is_loading=True)
    wanted = everything if recipe.parallel.engine == "deepspeed" else {"weights": everything["weights"]}
    for piece in engine.weights["ema"].pieces.values():
        piece.zero_()
    streams = reading.read_tensors(folder, wanted)
    with LiveBytes() as live:
        if recipe.parallel.engine == "deepspeed":
            engine.load_state_dict(streams)
        for name, tensor in streams["weights"]["ema"].items():
            engine.weights["ema"].assign(name, tensor)
    assert all(engine.weights["ema"].pieces[name].equal(piece) for name, piece in kept.items())
    return live.peak, sum(map(reading.size, wanted["weights"]["ema"].values()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(export, 1, [make_recipe(model=BF16)], folder)
    return load_file(folder / "0-ema" / SINGLE)


@pytest.mark.parametrize("case", CASES)
def test_no_rank_holds_more_than_the_largest_tensor_and_a_shard(case, tmp_path, whole):
    processes, recipes = CASES[case]
    largest = max(tensor.nbytes for tensor in whole.values())  # the nine modulations of a layer
    limit = largest + largest // 2
    assert sum(tensor.nbytes for tensor in whole.values()) > 8 * limit
    for peaks in run_ranks(export, processes, recipes, tmp_path):
        assert max(peaks) <= limit + NOISE, peaks
    for number in range(len(recipes)):
        ema, current = (load_file(tmp_path / f"{number}-{name}" / SINGLE) for name in ("ema", "current"))
        assert ema.keys() == whole.keys() and all(ema[key].equal(whole[key]) for key in whole)
        assert [key for key in current if current[key].any()] == ["pos_embed.pos_embed"]


@pytest.mark.parametrize(
    "recipe",
    [
        make_recipe((1, 2)),
        pytest.param(make_recipe(engine="deepspeed", zero_stage=2), marks=pytest.mark.slow),
    ],
    ids=["average", "zero2-everything"],
)
def test_a_checkpoint_is_loaded_a_few_tensors_at_a_time(recipe, tmp_path):
    # with DeepSpeed a main copy and its two moments come together
    at_once = LARGEST * (3 if recipe.parallel.engine == "deepspeed" else 1)
    for peak, average in run_ranks(load, 2, recipe, tmp_path / "checkpoint", at_once):
        # the last of those before, and what is being read from a file
        assert peak <= 2 * at_once + LARGEST + NOISE
        assert average > 5 * LARGEST
