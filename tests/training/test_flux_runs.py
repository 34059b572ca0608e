"""Runs of a guidance-distilled FLUX over images of two sizes: as recorded, at every layout, and resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from golden import assert_golden
from multirank import run_ranks
from safetensors.torch import load_file, save_file
from tiny_runs import ROOT, logged, tiny_recipe

from soar_mega.config import Recipe
from soar_mega.convert import scheduler_shift
from soar_mega.data.info import DatasetInfo
from soar_mega.data.made_up import write_made_up_shards

GOLDEN = Path(__file__).with_name("golden_flux_losses.json")
BASE = ROOT / "recipes/tiny/flux_base"
TP2_SP = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": "true"}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "cp2": (2, {"parallel__context_parallel_size": 2}),
    "pp2-vpp2-recomputed": (
        2,
        PP2
        | {
            "parallel__virtual_pipeline_model_parallel_size": 2,
            "model__recompute_granularity": "full",
        },
    ),
    "pp4": (4, {"parallel__pipeline_model_parallel_size": 4}),
    "tp2-sp-pp2": (4, TP2_SP | PP2),
    "deepspeed-tp2": (2, {"parallel__tensor_model_parallel_size": 2, "parallel__engine": "deepspeed"}),
    "deepspeed-zero3": (2, {"parallel__zero_stage": 3, "parallel__engine": "deepspeed"}),
}


def flux_recipe(shards: Path, folder: Path, **overrides: Any) -> Recipe:
    settings: dict[str, Any] = {
        "train__train_iters": 6,
        "checkpoint__save_interval": 3,
        "checkpoint__keep_last": 0,
        "optimizer__lr": 1e-4,
        "train__global_batch_size": 8,
    }
    settings["model__pipeline_dir"] = BASE
    return tiny_recipe(shards, folder, "flux_soar", **(settings | overrides))


@pytest.fixture(scope="module")
def flux_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square and wide images: the scheduler shifts them by their numbers of tokens."""
    folder = tmp_path_factory.mktemp("flux") / "shards"
    info = DatasetInfo(
        buckets={"16x16": 32, "32x16": 32},
        latent_channels=4,
        vae_scale_factor=2,
        text_shape=(10, 64),
        pooled_size=32,
        max_sequence_length=10,
        text_dtype="float32",
        encoders={},
    )
    write_made_up_shards(folder, info, seed=3)
    return folder


@pytest.fixture(scope="module")
def run(flux_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("flux_run")
    assert run_ranks(tiny_runs.run, 1, flux_recipe(flux_shards, folder)) == [0]
    return folder


def test_golden_losses(run: Path) -> None:
    assert scheduler_shift(BASE, 16) != scheduler_shift(BASE, 32)
    assert_golden(GOLDEN, [loss for loss, _ in logged(run).values()], "flux_base")


def test_one_that_is_told_no_scale_is_asked_in_both_branches(flux_shards: Path, tmp_path: Path) -> None:
    """As schnell: guided by a pair of answers, or by none at scale 1; at its own scheduler's shift, which is none."""
    for part in ("transformer", "scheduler"):
        shutil.copytree(BASE / part, tmp_path / "schnell" / part)
    for name, changes in (
        ("transformer/config.json", {"guidance_embeds": False}),
        ("scheduler/scheduler_config.json", {"shift": 1.0, "use_dynamic_shifting": False}),
    ):
        file = tmp_path / "schnell" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    [weights] = (tmp_path / "schnell/transformer").glob("*.safetensors")
    kept = {key: tensor for key, tensor in load_file(weights).items() if "guidance_embedder" not in key}
    save_file(kept, weights, {"format": "pt"})
    settings = {"model__pipeline_dir": tmp_path / "schnell", "train__train_iters": 2}
    recipes = [
        flux_recipe(flux_shards, tmp_path / str(scale), stage__guidance_scale=scale, **settings)
        for scale in (1.0, 4.5)
    ]
    assert run_ranks(run_each, 1, recipes) == [[0, 0]]
    alone, guided = ([loss for loss, _ in logged(Path(r.checkpoint.save)).values()] for r in recipes)
    assert len(alone) == len(guided) == 2 and alone != guided


def run_each(recipes: list[Recipe]) -> list[int]:
    return [tiny_runs.run(recipe) for recipe in recipes]


def test_resumed_it_is_the_same_run(flux_shards: Path, run: Path, tmp_path: Path) -> None:
    halfway = tmp_path / "halfway"
    shutil.copytree(run, halfway, ignore=shutil.ignore_patterns("iter_0000006", "complete.json", "train.log"))
    (halfway / "latest_checkpointed_iteration.txt").write_text("3")
    assert run_ranks(tiny_runs.run, 1, flux_recipe(flux_shards, halfway)) == [0]
    assert logged(halfway) == {i: values for i, values in logged(run).items() if i > 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_does_not_depend_on_the_layout(
    name: str, flux_shards: Path, run: Path, tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name]
    assert (
        run_ranks(tiny_runs.run, ranks, flux_recipe(flux_shards, tmp_path / "run", **layout)) == [0] * ranks
    )
    expected, found = logged(run), logged(tmp_path / "run")
    assert found.keys() == expected.keys()
    for iteration, (loss, norm) in found.items():
        assert loss == pytest.approx(expected[iteration][0], rel=1e-5)
        assert norm == pytest.approx(expected[iteration][1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2-sp-pp2", "deepspeed-tp2"])
def test_adapters_of_it_do_not_depend_on_the_layout(name: str, flux_shards: Path, tmp_path: Path) -> None:
    """On every linear, with dropout."""
    lora = {"lora__rank": 2, "lora__dropout": 0.2, "lora__targets": "[*]", "train__train_iters": 3}
    ranks, layout = LAYOUTS[name]
    for count, folder, settings in ((1, "one", {}), (ranks, "many", layout)):
        recipe = flux_recipe(flux_shards, tmp_path / folder, **lora, **settings)
        assert run_ranks(tiny_runs.run, count, recipe) == [0] * count
    expected, found = logged(tmp_path / "one"), logged(tmp_path / "many")
    assert found.keys() == expected.keys() and len(found) == 3
    for iteration, (loss, norm) in found.items():
        assert loss == pytest.approx(expected[iteration][0], rel=1e-5)
        assert norm == pytest.approx(expected[iteration][1], rel=1e-4)
