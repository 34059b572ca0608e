"""Runs that train adapters: what they leave behind, how they resume, what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from golden import assert_golden
from multirank import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import ROOT, logged, steps, tiny_recipe

from soar_mega.checkpoints.adapters import checkpoint_to_adapters
from soar_mega.checkpoints.exchange import checkpoint_to_folder
from soar_mega.checkpoints.model_source import find_source
from soar_mega.cli import main
from soar_mega.config import ParallelConfig
from soar_mega.convert import load_diffusers
from soar_mega.convert.adapter_files import load_adapted, open_lora
from soar_mega.convert.weights import open_weights
from soar_mega.distributed import stop_world
from soar_mega.models.common.conditions import Conditions

GOLDEN = Path(__file__).with_name("golden_lora_losses.json")
BASE = ROOT / "recipes/tiny/base"
RANK, ALPHA = 8, 16.0
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def lora_recipe(shards: Path, folder: Path, **overrides: Any) -> Any:
    settings = {"train__train_iters": 6, "checkpoint__save_interval": 3, "checkpoint__keep_last": 0}
    return tiny_recipe(shards, folder, "soar_lora", **(settings | overrides))


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process, with checkpoints at 3 and 6, and exported."""
    folder = tmp_path_factory.mktemp("lora")
    assert run_ranks(tiny_runs.run, 1, lora_recipe(shards, folder, checkpoint__export="true")) == [0]
    return folder


@pytest.fixture
def halfway(run: Path, tmp_path: Path) -> Path:
    """The run as it was at iteration 3."""
    folder = tmp_path / "halfway"
    shutil.copytree(
        run, folder, ignore=shutil.ignore_patterns("export*", "iter_0000006", "complete.json", "train.log")
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


@pytest.fixture
def world() -> Any:
    yield
    stop_world()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def inputs(model: Any) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    sizes = model.sizes
    shapes = (
        (2, sizes.in_channels, 8, 8),
        (2, 20, sizes.joint_attention_dim),
        (2, sizes.pooled_projection_dim),
    )
    latents, text, pooled = (torch.randn(shape, generator=draw) for shape in shapes)
    return latents, torch.tensor([100.0, 900.0]), text, pooled


def test_golden_losses(run: Path) -> None:
    assert_golden(GOLDEN, [loss for loss, _ in logged(run).values()][:5])


def test_resumed_it_is_the_same_run(shards: Path, run: Path, halfway: Path, world: None) -> None:
    """To the bit on one process: adapters, their moments and their average."""
    assert run_ranks(tiny_runs.run, 1, lora_recipe(shards, halfway)) == [0]
    from soar_mega.config import ParallelConfig
    from soar_mega.distributed import start_world

    start_world(ParallelConfig())
    first, second = (tiny_runs.tensors(folder / "iter_0000006") for folder in (run, halfway))
    assert first.keys() == second.keys()
    names = [key for key, value in first.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(first[key], second[key]) for key in names)
    # nothing but adapters is in a checkpoint
    assert all(".lora." in key for key in names)
    assert {key.split(".layers")[0] for key in names if ".lora." in key} >= {
        "weights.ema",
        "optimizer.state.exp_avg",
    }
    assert logged(halfway) == {i: values for i, values in logged(run).items() if i > 3}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": "true"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"parallel__pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["tp2-sp", "pp2"],
)
def test_resumed_at_another_layout(shards: Path, run: Path, halfway: Path, layout: dict[str, Any]) -> None:
    again = lora_recipe(shards, halfway, checkpoint__export="true", **layout)
    assert run_ranks(tiny_runs.run, 2, again) == [0, 0]
    expected = logged(run)
    for iteration, (loss, norm) in logged(halfway).items():
        assert loss == pytest.approx(expected[iteration][0], rel=1e-5)
        assert norm == pytest.approx(expected[iteration][1], rel=1e-4)
    for file in (
        f"export/{TRANSFORMER}",
        "export_lora/adapter_model.safetensors",
        f"export_ema/{TRANSFORMER}",
    ):
        ours, theirs = load_file(halfway / file), load_file(run / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_the_export_is_the_base_with_adapters(
    run: Path, tmp_path: Path, world: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged and unmerged are equal to 1e-5; both formats hold the same; a checkpoint gives both again."""
    merged = load_diffusers(run / "export")
    given = inputs(merged)
    velocity = merged(*given).detach()
    assert relative_error(load_diffusers(BASE)(*given), velocity) > 1e-3
    for name in ("", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        model, _ = load_adapted(BASE, run / "export_lora" / name)
        assert relative_error(model(*given), velocity) < 1e-5
    stored = open_lora(run / "export_lora")
    assert (stored.rank, stored.alpha) == (RANK, ALPHA)
    files = (run / "run_config.yaml", *(run / "export_lora").iterdir())
    assert len({file.stat().st_mode for file in files}) == 1  # the umask's
    peft = load_file(run / "export_lora/adapter_model.safetensors")
    theirs = load_file(run / "export_lora/pytorch_lora_weights.safetensors")
    assert all(key.startswith("base_model.model.transformer_blocks.") for key in peft)
    assert {key.replace("base_model.model.", "transformer."): t.sum().item() for key, t in peft.items()} == {
        key: t.sum().item() for key, t in theirs.items()
    }
    assert main(["convert", str(run), str(tmp_path / "adapters"), "--to", "adapters", "--ema"]) == 0
    ema = load_file(run / "export_lora_ema/adapter_model.safetensors")
    again = load_file(tmp_path / "adapters/adapter_model.safetensors")
    assert ema.keys() == again.keys() == peft.keys()
    assert all(torch.equal(again[key], ema[key]) for key in ema)
    assert not all(torch.equal(ema[key], peft[key]) for key in ema)
    # of which nothing but the checkpoint is in the way
    shutil.copytree(run / "iter_0000006", tmp_path / "alone")
    checkpoint_to_adapters(tmp_path / "alone", tmp_path / "beside", ema=True)
    assert load_file(tmp_path / "beside/adapter_model.safetensors").keys() == peft.keys()
    assert checkpoint_to_folder(run, tmp_path / "merged")
    ours, exported = load_file(tmp_path / "merged" / TRANSFORMER), load_file(run / "export" / TRANSFORMER)
    assert all(torch.equal(ours[key], exported[key]) for key in exported)
    adapters = ["--lora", str(run / "export_lora")]
    assert main(["convert", str(BASE), str(tmp_path / "by_hand"), *adapters]) == 0
    merged = load_file(tmp_path / "by_hand" / TRANSFORMER)
    nested = tmp_path / "checkpoint-2/lora"  # as flow_grpo keeps them
    shutil.copytree(run / "export_lora", nested)
    assert main(["convert", str(run), str(tmp_path / "twice"), "--lora", str(nested.parent)]) == 0
    twice = load_file(tmp_path / "twice" / TRANSFORMER)
    base = load_file(BASE / TRANSFORMER)
    key = "transformer_blocks.0.attn.to_q.weight"
    torch.testing.assert_close(twice[key] - base[key], 2 * (merged[key] - base[key]), rtol=1e-3, atol=1e-7)
    assert (tmp_path / "twice/training_facts.json").is_file()
    assert main(["convert", f"{BASE}+{nested}", str(tmp_path / "old_way")]) == 1
    assert f"{BASE} --lora {nested}" in capsys.readouterr().err
    for key, tensor in exported.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-8)
    options = ["--to", "transformer", "--dtype", "bf16"]
    assert main(["convert", str(BASE), str(tmp_path / "half"), *adapters, *options]) == 0
    ours = load_file(tmp_path / "half" / Path(TRANSFORMER).name)
    assert all(torch.equal(ours[key], merged[key].bfloat16()) for key in merged)
    file = tmp_path / "one.safetensors"
    assert main(["convert", str(BASE), str(file), *adapters]) == 0
    with open_weights(file, BASE) as weights:
        assert all(torch.equal(weights.read(key, torch.float32), merged[key]) for key in merged)


def test_diffusers_and_peft_load_the_files(run: Path, world: None) -> None:
    pytest.importorskip("peft")
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    merged = load_diffusers(run / "export")
    latents, timesteps, text, pooled = inputs(merged)
    expected = merged(latents, timesteps, text, pooled)

    def velocity(model: Any) -> torch.Tensor:
        return model(
            latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=timesteps
        ).sample

    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipeline.load_lora_weights(run / "export_lora")
    assert relative_error(velocity(pipeline.transformer), expected) < 1e-5
    from peft import PeftModel

    base = SD3Transformer2DModel.from_pretrained(BASE / "transformer")
    assert relative_error(velocity(PeftModel.from_pretrained(base, run / "export_lora")), expected) < 1e-5


@pytest.mark.slow
def test_sampling_with_adapters(run: Path, tmp_path: Path, world: None) -> None:
    """The same pictures from base and adapters, and from a checkpoint of them, as from the merged pipeline."""
    words = ["--prompt", "a red 3", "--steps", "3", "--seed", "1", "--guidance-scale", "2"]
    pictures = []
    for name, pipeline in (
        ("merged", run / "export"),
        ("adapted", f"{BASE}+{run / 'export_lora'}"),
        ("checkpoint", run),
        ("base", BASE),
    ):
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(pipeline), *words, "--out", str(out)]) == 0
        pictures.append(out)
    from PIL import Image

    merged, adapted, checkpoint, base = (
        torch.tensor(list(Image.open(p).convert("RGB").tobytes())).int() for p in pictures
    )
    assert (merged - adapted).abs().max() <= 1 < (merged - base).abs().max()
    assert torch.equal(checkpoint, adapted)


def test_a_checkpoint_of_adapters_is_drawn_with_on_its_base(
    run: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What evaluates a run while it trains draws with its checkpoints."""
    of_checkpoint = find_source(str(run), ema=True).generator("fp32", ParallelConfig(), decodes=True)
    exported = find_source(BASE, adapters=str(run / "export_lora_ema")).generator(
        "fp32", ParallelConfig(), True
    )
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    said = Conditions(torch.randn(2, 20, 64, generator=draw), torch.randn(2, 64, generator=draw))
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)
    velocities = [each.velocity(latents, sigma, said) for each in (of_checkpoint, exported)]
    base = find_source(BASE).generator("fp32", ParallelConfig(), True).velocity(latents, sigma, said)
    assert torch.equal(*velocities) and not torch.equal(velocities[0], base)
    monkeypatch.setattr("soar_mega.checkpoints.model_source.start_world", lambda parallel: None)
    with pytest.raises(ValueError, match="lies whole in each process"):
        find_source(str(run)).generator("fp32", ParallelConfig(tensor_model_parallel_size=2), True)


def first_state(shards: Path, folder: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    with steps(shards, folder, **overrides) as run:
        engine = run.engine
        return {name: engine.parameters[name].detach().clone() for name in engine.adapters.names}


def test_a_run_starts_from_adapters(shards: Path, run: Path, tmp_path: Path, world: None) -> None:
    config = {"lora__rank": RANK, "lora__alpha": ALPHA}
    for number, file in enumerate(("export_lora", "export_lora/pytorch_lora_weights.safetensors")):
        found = first_state(shards, tmp_path / str(number), lora__load=run / file, **config)
        stored = load_file(run / "export_lora/adapter_model.safetensors")
        assert len(found) == len(stored)
        assert sorted(t.double().sum().item() for t in found.values()) == sorted(
            t.double().sum().item() for t in stored.values()
        )


def damaged(run: Path, folder: Path, what: str) -> Path:
    """Adapters with something wrong."""
    folder.mkdir()
    file = folder / "pytorch_lora_weights.safetensors"
    source = run / "export_lora" / file.name
    tensors = load_file(source)
    with safe_open(source, "pt") as handle:
        metadata = handle.metadata()
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    if what == "missing":
        del tensors[key]
    elif what == "extra":
        tensors["transformer.transformer_blocks.0.ff.net.2.lora_A.weight"] = tensors[key].clone()
    elif what == "misshaped":
        tensors[key] = tensors[key][:, :-1].clone()
    elif what == "NaN":
        tensors[key][0, 0] = torch.nan
    elif what == "kind":
        tensors["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"] = tensors[key][0].clone()
    elif what == "dora":
        metadata["lora_adapter_metadata"] = json.dumps({"transformer.use_dora": True})
    save_file(tensors, file, metadata)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "1 missing: transformer_blocks.0.attn.to_q.lora_A.weight"),
        ("extra", "1 unknown: transformer_blocks.0.ff.net.2.lora_A.weight"),
        ("misshaped", "to_q.lora_A.weight in .* is .*, this model has"),
        ("NaN", "to_q.lora_A.weight in .* holds NaN"),
        ("kind", "to_q.lora_magnitude_vector"),
        ("dora", "use_dora=True"),
        ("truncated", "cannot be read, it may be truncated"),
    ],
)
def test_damaged_adapters_are_refused(
    shards: Path, run: Path, tmp_path: Path, world: None, what: str, words: str
) -> None:
    folder = damaged(run, tmp_path / "adapters", what)
    settings = {"lora__rank": RANK, "lora__alpha": ALPHA, "lora__load": folder}
    with pytest.raises(ValueError, match=words):
        first_state(shards, tmp_path / "run", **settings)


def test_other_adapters_and_another_base_are_refused(
    shards: Path,
    run: Path,
    halfway: Path,
    tmp_path: Path,
    world: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapters = {"lora__rank": RANK, "lora__alpha": ALPHA}
    with pytest.raises(ValueError, match=r"set lora.rank=8"):
        first_state(shards, tmp_path / "a", lora__rank=4, lora__load=run / "export_lora")
    with pytest.raises(ValueError, match=r"set lora.alpha=16"):
        first_state(shards, tmp_path / "a", lora__rank=RANK, lora__load=run / "export_lora")
    with pytest.raises(
        ValueError, match=r"checkpoint of another model: _lora is .*'rank': 8.* there and .*'rank': 4"
    ):
        first_state(shards, halfway, lora__rank=4)
    without = pytest.raises(ValueError, match="checkpoint of another model: _lora is .* there and None here")
    with without, steps(shards, halfway):
        pass
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    tensors = load_file(other / TRANSFORMER)
    tensors["proj_out.bias"][0] += 1e-6
    save_file(tensors, other / TRANSFORMER, {"format": "pt"})
    with pytest.raises(ValueError, match="checkpoint of another model: _lora is .*'base'"):
        first_state(shards, halfway, model__pipeline_dir=other, **adapters)
    recipe = halfway / "run_config.yaml"
    recipe.write_text(recipe.read_text().replace(f"pipeline_dir: {BASE}\n", f"pipeline_dir: {other}\n"))
    words = f"{other} does not hold the weights that the adapters in {halfway}/iter_0000003 were trained on"
    for verb in ("convert", "sample"):
        options = [str(tmp_path / "out")] if verb == "convert" else ["--prompt", "a red 3"]
        assert main([verb, str(halfway), *options]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
