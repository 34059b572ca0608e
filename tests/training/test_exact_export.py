"""An export in float32 holds the optimizer's own numbers, and so does the run that starts from it."""

import json
from pathlib import Path

import pytest
import tiny_runs
import torch
from multirank import run_ranks
from safetensors.torch import load_file
from tiny_runs import ROOT, tiny_recipe
from torch import Tensor

from soar_mega.checkpoints.exchange import checkpoint_to_folder, weights_to_checkpoint
from soar_mega.checkpoints.resume import resume
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import CheckpointConfig, Recipe
from soar_mega.convert import WeightFiles
from soar_mega.convert.save import write_transformer
from soar_mega.convert.weights import open_weights
from soar_mega.distributed import start_world
from soar_mega.engines import make_engine
from soar_mega.models.family import model_sizes


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def started(recipe: Recipe, out: Path) -> None:
    """Writes the weights that runs have at their start, in float32: from an export, and from a checkpoint."""
    start_world(recipe.parallel)
    sizes, exact = model_sizes(recipe.model), WeightFiles(dtype=torch.float32)
    for place, load in (("export", ""), ("checkpoint", str(Path(recipe.model.pipeline_dir).parent))):
        engine = make_engine(recipe, sizes)
        if load and not recipe.lora.rank:
            config = CheckpointConfig(save=recipe.checkpoint.save, load=load, finetune=True)
            resume(RunFolder(config.save), config, engine, sizes.to_diffusers())
        write_transformer(engine.model, out / place / "transformer", engine.exported(exact=True), exact)


def as_a_checkpoint(pipeline: Path, run: Path) -> None:
    with open_weights(pipeline) as opened:
        weights_to_checkpoint(opened, pipeline, run)


def test_a_float32_checkpoint_without_an_optimizer_is_not_rounded(tmp_path: Path) -> None:
    base, run, out = ROOT / "recipes/tiny/base", tmp_path / "run", tmp_path / "out"
    run_ranks(as_a_checkpoint, 1, base, run)
    (run / "export").symlink_to(base)
    settings = {"model__dtype": "bf16", "model__pipeline_dir": run / "export"}
    run_ranks(started, 1, tiny_recipe(tmp_path, tmp_path / "second", **settings), out)
    expected, found = weights(out / "export"), weights(out / "checkpoint")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "names"),
    [
        pytest.param({"parallel__tensor_model_parallel_size": 2}, ("export", "export_ema"), id="tp2"),
        pytest.param({}, ("export", "export_ema"), id="dp2"),
        pytest.param({"parallel__use_distributed_optimizer": "false"}, ("export",), id="plain"),
        pytest.param(
            {"parallel__engine": "deepspeed", "parallel__zero_stage": 3},
            ("export", "export_ema"),
            id="zero3",
        ),
        pytest.param({"lora__rank": 2, "lora__alpha": 64}, ("export", "export_ema"), id="lora"),
    ],
)
def test_float32_from_the_main_weights(
    shards: Path, tmp_path: Path, layout: dict[str, object], names: tuple[str, ...]
) -> None:
    settings = {
        "model__dtype": "bf16",
        "train__train_iters": 2,
        "train__ema_decay": 0.9 if "export_ema" in names else 0,
        "optimizer__lr": 1e-5,
        "checkpoint__export": "true",
        "checkpoint__export_dtype": "fp32",
        **layout,
    }
    run, out = tmp_path / "run", tmp_path / "gone_on"
    first = tiny_recipe(shards, run, **settings)
    again = settings | {"model__pipeline_dir": run / "export"}
    assert run_ranks(tiny_runs.run, 2, first) == [0, 0]
    run_ranks(started, 2, tiny_recipe(shards, tmp_path / "second", **again), out)
    found = weights(run / "export")
    rounded = {key: tensor.bfloat16().float() for key, tensor in found.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    finer = sum(int((rounded[key] != tensor).sum()) for key, tensor in found.items())
    assert finer > 0.5 * sum(tensor.numel() for tensor in found.values())
    for start in ("export", "checkpoint"):
        goes_on = weights(out / start)
        assert all(torch.equal(goes_on[key], tensor) for key, tensor in found.items())
    for name in names:
        converted = tmp_path / f"{name}_converted"
        exact = WeightFiles(dtype=torch.float32)
        assert checkpoint_to_folder(run, converted, ema=name == "export_ema", files=exact)
        wanted = weights(run / name)
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in weights(converted).items())
        assert json.loads((run / name / "training_facts.json").read_text())["dtype"] == "fp32"
