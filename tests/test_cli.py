"""The command as a user meets it: help, errors, exit codes, and the whole road on a few canvases."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from multirank import run_ranks
from PIL import Image
from safetensors.torch import load_file

from soar_mega import __version__, layer_checks
from soar_mega.cli import DESCRIPTION, build_parser, doctor, main
from soar_mega.cli.sample import read_prompts
from soar_mega.data.batch import Batch
from soar_mega.data.info import DatasetInfo
from soar_mega.examples.digits.canvases import write_image_folder
from soar_mega.gpus import HOPPER
from soar_mega.models.common.flops import Tokens, forward_work, image_tokens, step_work
from soar_mega.models.family import presets, read_sizes
from soar_mega.outputs import MARKER
from soar_mega.stages import load_recipe

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "recipes/tiny/base")
VERBS = (
    "prepare",
    "data",
    "train",
    "sample",
    "evaluate",
    "convert",
    "serve-reward",
    "fetch-weights",
    "doctor",
)


# -- help and usage


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"soar-mega {verb} " in capsys.readouterr().out.partition("usage:")[2].partition("\n\n")[2]


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["sample", BASE, "--steps", "many"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: soar-mega" in capsys.readouterr().err


def test_module_is_the_command() -> None:
    """Without importing torch, so in a fraction of a second."""
    result = subprocess.run(
        [sys.executable, "-m", "soar_mega", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert result.stdout.strip() == f"soar_mega {__version__}"


@pytest.mark.parametrize(
    "words",
    [
        "-m soar_mega launch slurm recipes/tiny/soar.yaml data.path=recipes data.validation_path=recipes "
        "--nodes 1 --dry-run",
        pytest.param("tools/profile_step.py --help", marks=pytest.mark.slow),
    ],
)
def test_commands_and_tools_do_not_repeat_what_megatron_lacks(words: str) -> None:
    result = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0 and result.stdout, result.stderr
    assert "Warning" not in result.stderr and "not installed" not in result.stderr


def test_help_is_in_columns_and_names_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [line for line in DESCRIPTION.splitlines() if line.startswith("  soar-mega")]
    column = examples[0].index("what this machine")
    assert all(line[column - 1] == " " != line[column] for line in examples), examples
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    [named] = re.findall(r"a preset \((.*?)\)", " ".join(capsys.readouterr().out.split()))
    assert sorted(named.split(", ")) == sorted(presets())


def test_documented_examples_parse() -> None:
    """Every example of every --help is one that the parser takes."""
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    texts = [(verb.description or "").replace("\\\n", " ") for verb in verbs.values()]
    lines = [line for text in texts for line in text.splitlines()]
    examples = [line.strip() for line in lines if line.startswith("  soar-mega ")]
    assert len(examples) >= 12
    for example in examples:
        parser.parse_args(shlex.split(example.partition("   ")[0])[1:])


# -- errors


def test_a_users_error_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "no.yaml")]) == 1
    assert capsys.readouterr().err == f"soar-mega: error: {tmp_path}/no.yaml: no such recipe file\n"


def test_traceback_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOAR_MEGA_TRACEBACK", "1")
    assert main(["train", str(tmp_path / "no.yaml")]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    def broken(_: object) -> int:
        raise AssertionError("a defect")

    monkeypatch.setattr("soar_mega.training.run.train", broken)
    with pytest.raises(AssertionError, match="a defect"):
        main(["train", str(recipe)])


def test_other_ranks_let_rank_0_speak_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["train", str(tmp_path / "no.yaml")]) == 1
        assert f"soar-mega [rank {rank}]: error:" in capsys.readouterr().err
    assert len(waited) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sample", BASE], "no prompt"),
        (["sample", BASE, "--prompt", "x", "--steps", "0"], "--steps must be at least 1"),
        (["sample", BASE, "--prompt", "x", "--size", "16"], "WIDTHxHEIGHT"),
        (["sample", BASE, "--prompts", "no.txt"], "no.txt"),
        (["sample", "nowhere", "--prompt", "x"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere is not a diffusers pipeline folder"),
        (["evaluate", BASE, BASE], "given twice"),
        (["evaluate", BASE], "name a --suite to draw and score images, or --held-out SHARDS"),
        (["evaluate", BASE, "--held-out", "nowhere"], "nowhere"),
        (["evaluate", BASE, "--held-out", "x", "--drift-samples", "0"], "--drift-samples must be at least 1"),
        (["evaluate", BASE, "--held-out", "x", "--steps", "3"], "--steps and --watch go with --suite"),
        (["evaluate", BASE, "--seed", "-1"], "--seed must be at least 0"),
        (
            ["evaluate", BASE, "--held-out", "x", "--guidance-scale", "nan"],
            "--guidance-scale must be a number",
        ),
        (["sample", BASE, "--prompt", "x", "--guidance-scale", "inf"], "--guidance-scale must be a number"),
        (
            ["sample", BASE, "--prompt", "x", "--max-sequence-length", "-3"],
            "max_sequence_length is -3: it must be",
        ),
        (
            ["sample", BASE, "--prompt", "x", "--ema"],
            "--ema, --pipeline-dir and sizes of a layout go with a checkpoint",
        ),
        (["sample", "nowhere", "--prompt", "x"], "nowhere is no folder: give a diffusers pipeline folder"),
        (["sample", BASE, "--prompt", "caf\udce9"], "'caf\\udce9' is no text"),
        (
            ["prepare", BASE, "out", "--pipeline-dir", BASE, "--max-sequence-length", "-3"],
            "max_sequence_length is -3",
        ),
        (["prepare", BASE, "out", "--pipeline-dir", BASE, "--resolution", "0"], "resolution is 0"),
        (["prepare", "nowhere", "out", "--pipeline-dir", BASE], "nowhere"),
        (["convert", "nowhere", "out"], "nowhere: no such file or folder"),
        (["convert", BASE, "out", "--ema"], "--ema"),
        (["convert", BASE, "out", "--to", "adapters"], "--to adapters go with a checkpoint"),
        (["convert", f"{BASE}+lora", "out"], f"adapters are named apart here: {BASE} --lora lora"),
        (["convert", BASE, "out", "--lora", "lora", "--prefix", "x."], "--prefix goes with --to original"),
        (["convert", BASE, "out", "--lora", "nowhere"], "nowhere holds no adapters"),
        (["convert", BASE, "out", "--to", "original"], "out: a single file ends in .safetensors"),
        (["convert", BASE, "out", "--variant", "fp16"], "not with --to checkpoint"),
        (["convert", BASE, "out", "--dtype", "fp16"], "--dtype: a checkpoint holds fp32 or bf16"),
        (["convert", BASE, "x.safetensors", "--max-shard-size", "0"], "--max-shard-size must be above 0"),
        (["doctor", "--model", "sd99"], "sd99"),
    ],
)
def test_bad_arguments_are_named(
    argv: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("soar-mega: error: ") and words in error


def test_a_pipeline_that_is_not_there_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipes name theirs from the repository's root, and the command may be started elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    recipe = str(ROOT / "recipes/tiny/soar.yaml")
    assert main(["train", recipe, "data.path=shards", f"checkpoint.save={tmp_path}/run"]) == 1
    assert f"error: {tmp_path}/recipes/tiny/base does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_a_usage_error_asks_for_no_overrides(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb])
    missing = capsys.readouterr().err.partition("are required: ")[2]
    assert "recipe" in missing and "group.key=value" not in missing


def test_prompts_that_are_no_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    assert main(["sample", BASE, "--prompts", str(tmp_path / "prompts.txt")]) == 1
    assert f"{tmp_path}/prompts.txt is not UTF-8" in capsys.readouterr().err


# -- train


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{pipeline_dir: {BASE}}}\ndata: {{path: shards}}\ncheckpoint: {{save: run}}\n")
    return path


@pytest.mark.parametrize("code", [0, 75])
def test_train_passes_the_recipe_on_and_the_exit_code_back(
    code: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("soar_mega.training.run.train", lambda r: seen.append(r) or code)
    assert main(["train", str(recipe), "train.seed=7", "stage.name=sft"]) == code
    assert (seen[0].train.seed, seen[0].stage.name, seen[0].model.pipeline_dir) == (7, "sft", BASE)


def test_show_prints_the_settings_and_starts_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    for work in ("soar_mega.cli.process.start_process", "soar_mega.training.run.train"):
        monkeypatch.setattr(work, lambda *arguments: pytest.fail("the process was started"))
    command = ["train", str(recipe), "train.seed=7", "--show"]
    assert main(command) == 0
    (recipe.parent / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(recipe.parent / "shown.yaml") == load_recipe(recipe, ["train.seed=7"])
    assert main([*command, "--scale-down"]) == 0
    assert "save: run_scaled_down/run\n" in capsys.readouterr().out
    assert {path.name for path in recipe.parent.iterdir()} == {"recipe.yaml", "shown.yaml"}
    assert main([*command, "optimizer.lr=fast"]) == 1
    shown = capsys.readouterr()
    assert not shown.out and "optimizer.lr: expected a number, found 'fast'" in shown.err
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 0 and not capsys.readouterr().out


# -- doctor


def test_doctor_tells_versions_and_reasons(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert metadata.version("torch") in said  # without the +cu130 of a CUDA build
    for name in doctor.OPTIONAL:
        assert name in said
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-library"))
    assert main(["doctor"]) == 1
    assert "no-such-library      MISSING" in capsys.readouterr().out


def test_doctor_counts_the_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(48)))
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.cores_per_process(8) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert doctor.cores_per_process(8) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert doctor.cores_per_process(8) == 1
    assert "TOO FEW" in doctor.cores(3) and "num_workers=2" in doctor.cores(6)


def test_doctor_knows_a_pair_of_versions_that_fails() -> None:
    assert "numpy<2.4" in (doctor.unusable_pair("3.6.0", "2.4.0") or "")
    assert doctor.unusable_pair("3.7.1", "2.4.6") is doctor.unusable_pair("3.6.0", "2.3.5") is None


def test_doctor_says_why_a_library_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.examine("transformer-engine")[0] is False or doctor.installed("transformer-engine")
    monkeypatch.setitem(doctor.OPTIONAL, "psutil", ("psutil.no_such_part", "a test", False))
    usable, words = doctor.examine("psutil")
    assert not usable and "does not load (No module named 'psutil.no_such_part')" in words
    monkeypatch.setitem(doctor.OPTIONAL, "put on the path by hand", ("json", "a test", False))
    assert doctor.examine("put on the path by hand") == (True, "of an unknown version; for a test")
    monkeypatch.setitem(doctor.OPTIONAL, "psutil", ("psutil", "a test", False))
    assert doctor.examine("psutil")[0]


KEYS = ("points_per_micro_batch", "micro_batch_size")


def test_doctor_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--model", "sd35_medium", "--gpus", "1", "--global-batch-size", "16", "--gpu"]
    assert main([*words, "h100"]) == 0
    assert "points_per_micro_batch=16 train.micro_batch_size=8 model.recompute_granularity=none" in (
        capsys.readouterr().out
    )
    assert main(["doctor", "--model", "sd35_large", "--gpus", "8", "--gpu", "h100"]) == 0
    light = "model.recompute_granularity=selective model.recompute_modules=[layernorm,mlp_act,qk_layernorm]"
    assert light in capsys.readouterr().out
    assert main([*words, "a100-40"]) == 0
    assert "does not fit even with recomputation" in capsys.readouterr().out


def test_doctor_halves_answers_of_guided_models_alone_and_advises_flash_attention_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is told its guidance answers in one branch, so as many samples of a forward as points."""
    words = ["doctor", "--gpus", "64", "--global-batch-size", "512", "--points", "3", "--model"]
    monkeypatch.setattr(layer_checks, "find_spec", lambda name: name == layer_checks.FLASH_3_MODULE)
    for model, branches in (("flux_dev", 1), ("sd35_medium", 2)):
        assert main([*words, model, "--gpu", "h200"]) == 0
        said = capsys.readouterr().out
        points, samples = (int(re.search(f"train.{key}=(\\d+)", said)[1]) for key in KEYS)  # type: ignore[index]
        assert samples == max(n for n in (1, 2, 4, 8) if branches * n <= points)
        assert "model.attention_backend=flash" in said
    assert "b200" not in HOPPER and not layer_checks.has_flash_3(head_size=512)


def test_recipes_say_what_doctor_says_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a recipe names GiB of the memory model, it names the command, which says the same."""
    checked = 0
    for file in sorted((ROOT / "recipes").glob("*/*.yaml")):
        comment = re.search(
            r"(\d+) GiB by the memory model( \(soar-mega (doctor --recipe THIS [^)]*)\))?", file.read_text()
        )
        if comment is None:
            continue
        assert comment[3], f"{file} names no command"
        assert main(comment[3].replace("THIS", str(file)).split()) == 0
        said = re.search(
            r"as the recipe says: \d+ training forwards of a step, ([\d.]+) GiB", capsys.readouterr().out
        )
        assert said and round(float(said[1])) == int(comment[1]), file
        checked += 1
    assert checked >= 8


def test_doctor_takes_settings_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Options are its settings, a setting needs a recipe, and a pipeline folder of its own is its model."""
    words = ["doctor", "--recipe", "recipes/tiny/soar.yaml", "--gpu", "h100", "--gpus"]
    assert main([*words, "4", "--tensor", "2", "parallel.context_parallel_size=2", "--points", "3"]) == 0
    said = capsys.readouterr().out
    assert "1,361,056 parameters" in said and "TP 2 x PP 1" in said and "as the recipe says" in said
    assert "at 128 px" in said  # the model has no positions for larger images
    assert main([*words, "3", "--tensor", "2"]) == 1
    assert "--gpus 3 must be a multiple of the layout's TP x PP x CP = 2" in capsys.readouterr().err
    assert main(["doctor", "--model", "sd35_medium", "train.seed=1"]) == 1
    assert "train.seed=1 is a setting of a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h100"], "Name --model or --recipe"),
        (["--model", "sd35_medium", "--gpus", "0"], "--gpus must be at least 1"),
        (["--model", "sd35_medium", "--points", "-2"], "--points must be at least 1"),
        (["--model", "sd35_medium", "--image-size", "504"], "it must be a multiple of 16 and at most 6144"),
        (["--model", "sd35_medium", "--gpus", "64"], "must be a multiple of the 64 data-parallel replicas"),
    ],
)
def test_doctor_names_what_cannot_be_asked(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = [] if "--gpu" in words else ["--gpu", "H100"]  # in any case of letters
    assert main(["doctor", *words, *gpu]) == 1
    assert said in capsys.readouterr().err


def test_doctor_takes_a_preset_where_the_folder_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "doctor",
        "--recipe",
        str(ROOT / "recipes/sd35_medium/soar.yaml"),
        "--gpu",
        "h100",
        "model.fp8=hybrid",
    ]
    assert main([*words, "model.transformer_impl=transformer_engine"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" not in said
    assert main([*words[:-1], "--image-size", "1024"]) == 0
    assert "which DOES NOT FIT" in capsys.readouterr().out
    assert (
        said.startswith("sd35_medium: ")
        and "activations are counted as in bf16, of which FP8 keeps less" in said
    )


def test_doctor_describes_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", BASE, "--tensor", "2", "--pipeline", "2"]) == 0
    said = capsys.readouterr().out
    assert "1,361,056 parameters" in said and "TP 2 x PP 2" in said


# -- the whole road, on 16 canvases and two steps


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/ and run/, made by the command for a group that shares it."""
    folder = tmp_path_factory.mktemp("road")
    private = os.umask(0o027)
    try:
        walk(folder)
    finally:
        os.umask(private)
    return folder


def training(folder: Path) -> list[str]:
    """The command."""
    overrides = [
        f"model.pipeline_dir={BASE}",
        f"data.path={folder}/shards",
        "data.validation_path=",
        f"checkpoint.save={folder}/run",
        "train.train_iters=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.ema_decay=0.5",
        *(f"logging.{name}_interval=0" for name in ("eval", "drift", "sample")),
    ]
    return ["train", str(ROOT / "recipes/tiny/soar.yaml"), *overrides]


def walk(folder: Path) -> None:
    write_image_folder(folder / "images", 16, seed=0)
    assert main(["prepare", str(folder / "images"), str(folder / "shards"), "--pipeline-dir", BASE]) == 0
    assert main(training(folder)) == 0


def test_a_run_keeps_what_show_prints(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*training(road), "--show"]) == 0
    assert capsys.readouterr().out == (road / "run/run_config.yaml").read_text()


def test_everything_takes_the_umask(road: Path) -> None:
    files = sorted((road / "shards").rglob("*")) + sorted((road / "run").rglob("*"))
    modes = {(path.is_dir(), oct(path.stat().st_mode & 0o777)): path for path in files}
    assert len(files) > 50 and modes.keys() == {(True, "0o750"), (False, "0o640")}, modes


def transformer_bytes(pipeline: Path) -> bytes:
    """The weights of a pipeline, key after key."""
    weights = load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    return b"".join(weights[key].numpy().tobytes() for key in sorted(weights))


def weight_bytes(pipeline: Path) -> tuple[int, int]:
    """Of all weights of a pipeline, and of the largest one."""
    weights = load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    sizes = [tensor.nbytes for tensor in weights.values()]
    return sum(sizes), max(sizes)


def test_converted_checkpoint_is_the_export(road: Path, tmp_path: Path) -> None:
    assert main(["convert", str(road / "run"), str(tmp_path / "current")]) == 0
    with LiveBytes() as live:
        assert main(["convert", str(road / "run/iter_0000002"), str(tmp_path / "ema"), "--ema"]) == 0
    size, largest = weight_bytes(road / "run/export_ema")
    limit = 2 * largest + 2**14  # a tensor, and the part of one that is being read
    assert live.peak < limit < size / 4
    current, ema = transformer_bytes(tmp_path / "current"), transformer_bytes(tmp_path / "ema")
    assert current == transformer_bytes(road / "run/export")
    assert ema == transformer_bytes(road / "run/export_ema")
    assert len({current, ema, transformer_bytes(Path(BASE))}) == 3
    card = (tmp_path / "ema/README.md").read_text()
    assert card == (road / "run/export_ema/README.md").read_text()
    assert "moving average" in card and "max_sequence_length=10" in card and __version__ in card
    assert "num_auxiliary_points" in card and f"from {BASE}/transformer (SHA-256 " in card
    facts = json.loads((tmp_path / "ema/training_facts.json").read_text())
    assert facts == json.loads((road / "run/export_ema/training_facts.json").read_text())
    assert (facts["max_sequence_length"], facts["width"], facts["dtype"]) == (10, 16, "fp32")
    there = {p.name for p in (tmp_path / "ema").iterdir()}
    assert there == {MARKER, "README.md", "training_facts.json", *(p.name for p in Path(BASE).iterdir())}


def test_diffusers_to_checkpoint_and_back_is_bitwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", BASE, str(tmp_path / "start")]) == 0
    assert main(["convert", str(tmp_path / "start"), str(tmp_path / "back"), "--pipeline-dir", BASE]) == 0
    assert transformer_bytes(tmp_path / "back") == transformer_bytes(Path(BASE))
    capsys.readouterr()
    assert (
        main(["convert", str(tmp_path / "start"), str(tmp_path / "ema"), "--ema", "--pipeline-dir", BASE])
        == 1
    )
    assert "no EMA weights" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "start"), str(tmp_path / "lora"), "--to", "adapters"]) == 1
    assert "is of a run that trained the weights themselves" in capsys.readouterr().err
    assert main(["convert", BASE, str(tmp_path / "start")]) == 1
    assert "holds checkpoints already" in capsys.readouterr().err


def test_prompts_are_read_without_a_byte_order_mark_and_as_utf_8_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red 3\n\n caf\u00e9\u2028noir \n", encoding="utf-8-sig")
    assert read_prompts(str(file)) == ["a red 3", "caf\u00e9\u2028noir"]
    file.write_text("caf\u00e9", encoding="latin-1")
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8"):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("model", "scale", "message"),
    [
        (BASE, "1", "give a --guidance-scale above 1"),
        (str(ROOT / "recipes/tiny/flux_base"), "3", "is told a guidance scale"),
    ],
)
def test_a_negative_prompt_that_nothing_reads_is_refused(
    model: str, scale: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a", "--negative-prompt", "b", "--guidance-scale", scale]
    assert main(["sample", model, *words, "--out", str(tmp_path / "x.png")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_sample_writes_a_row_per_prompt(road: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red 3\n\n a green 7 \n")
    out = tmp_path / "grid.png"
    arguments = ["--prompts", str(prompts), "--count", "3", "--steps", "1", "--scale", "2", "--out", str(out)]
    assert main(["sample", str(road / "run/export"), *arguments]) == 0
    assert Image.open(out).size == (3 * 16 * 2, 2 * 16 * 2)


@pytest.mark.parametrize("command", [["sample", "--prompt", "a 3"], ["evaluate", "--suite", "digits"]])
def test_a_checkpoint_is_not_drawn_with_the_encoders_of_another_model(
    command: list[str], road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(pipeline: Path) -> str:
        assert main([*command, str(road / "run"), "--pipeline-dir", str(pipeline), *out]) == 1
        return capsys.readouterr().err

    out = ["--out", str(tmp_path / "drawn.png")]
    assert "is of a pipeline with a FluxTransformer2DModel" in refusal(ROOT / "recipes/tiny/flux_base")
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    config = other / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pooled_projection_dim": 32}))
    assert f"{other} has the encoders of a transformer with pooled_projection_dim 32" in refusal(other)
    assert not (tmp_path / "drawn.png").exists()


def sample_at_a_layout(run: str, out: str, *layout: str) -> int:
    options = ["--prompt", "a red 3", "--negative-prompt", "a blue 5", "--steps", "3", "--out", out]
    return main(["sample", run, "--solver", "dpm++2m", *options, *layout])


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_draws_at_any_layout_what_its_export_does(
    road: Path, tmp_path: Path, tensor: int
) -> None:
    layout = ("--ema", "--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", "2")
    drawn = [str(tmp_path / f"{name}.png") for name in ("sharded", "whole", "current")]
    assert run_ranks(sample_at_a_layout, 2 * tensor, str(road / "run"), drawn[0], *layout) == [0] * 2 * tensor
    assert sample_at_a_layout(str(road / "run/export_ema"), drawn[1]) == 0
    assert sample_at_a_layout(str(road / "run/iter_0000002"), drawn[2]) == 0
    sharded, whole, current = (np.asarray(Image.open(path)).astype(int) for path in drawn)
    assert abs(sharded - whole).max() <= 1  # of 255
    assert abs(current - whole).max() > 1  # other weights


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("grid", "is not the name of a picture"),
        ("grid.bmp", "is not the name of a picture"),
        ("folder.png", "is a folder"),
        ("mine.png", "was not written by this program"),
        ("mine.png/grid.png", "File exists"),
    ],
)
def test_where_results_go_is_tried_first(
    tmp_path: Path,
    out: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "mine.png").write_text("mine")
    commands = {
        "soar_mega.data.prompts.encode_prompts": ["sample", BASE, "--prompt", "a 3"],
        "soar_mega.evaluation.pipeline_drift.measure_drift_alone": ["evaluate", BASE, "--held-out", "x"],
    }
    for work, command in commands.items():
        if command[0] == "evaluate" and "picture" in words:
            continue
        monkeypatch.setattr(work, lambda *arguments: pytest.fail("computed in vain"))
        assert main([*command, "--out", str(tmp_path / out)]) == 1
        assert words in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "mine.png"]


@pytest.fixture(scope="module")
def evaluated(road: Path) -> Path:
    """What `--suite digits` makes of a pipeline, an export and a checkpoint."""
    out = road / "evaluated"
    models = [f"base={BASE}", f"soar={road}/run/export", f"same={road}/run"]
    drift = ["--held-out", str(road / "shards"), "--drift-samples", "4", "--drift-steps", "1"]
    sampling = ["--guidance-scale", "3", "--guidance-scale", "1", "--steps", "1"]
    assert main(["evaluate", *models, "--suite", "digits", *sampling, *drift, "--out", str(out)]) == 0
    return out


def test_a_suite_knows_the_training_behind_its_models(road: Path, evaluated: Path) -> None:
    said = json.loads((evaluated / "report.json").read_text())
    base, soar, same = (said["models"][name] for name in ("base", "soar", "same"))
    assert base["training"] == [] and soar["training"] == same["training"]
    [run] = soar["training"]
    assert (run["stage"], run["iterations"], run["samples"]) == ("soar", 2, 8)
    info = DatasetInfo.from_json(json.loads((road / "shards/dataset.json").read_text()), road)
    sizes = read_sizes(BASE)
    tokens = Tokens(image_tokens(sizes, info.latent_shape("16x16")[1:]), info.text_shape[0])
    forwards = load_recipe(road / "run/run_config.yaml").stage.forwards()
    assert run["flops"] == 8 * step_work(forward_work(sizes, tokens), forwards.answers, forwards.points).total
    # a checkpoint draws what its export does
    images = {
        path.parents[1].name.rpartition("-")[0]: path.parents[1]
        for path in evaluated.glob("images/*/digits/*.png")
    }
    for drawn in (images["soar-g3-s1"] / "digits").iterdir():
        assert drawn.read_bytes() == (images["same-g3-s1"] / "digits" / drawn.name).read_bytes()


def test_drift_alone_is_that_of_a_suite(
    road: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "new" / "metrics.json"
    models = [f"base={BASE}", f"soar={road}/run/export"]
    scales = ["--guidance-scale", "3", "--guidance-scale", "1"]
    drift = ["--held-out", str(road / "shards"), "--drift-samples", "4", "--drift-steps", "1"]
    assert main(["evaluate", *models, *scales, *drift, "--out", str(metrics)]) == 0
    said = capsys.readouterr().out
    assert "soar " in said and "0.90 -> 0.65" in said
    measured = json.loads(metrics.read_text())["pipelines"]
    assert list(measured) == ["base", "soar"] and list(measured["soar"]["drift"]["scales"]) == ["3", "1"]
    base, soar = (measured[name]["drift"]["scales"] for name in measured)
    for spans in soar.values():
        assert [(span["from"], span["to"]) for span in spans] == [(0.9, 0.65), (0.75, 0.5), (0.5, 0.25)]
    assert base != soar and soar["1"] != soar["3"]
    suite = json.loads((evaluated / "report.json").read_text())["models"]
    assert [suite[name]["drift"]["scales"] for name in ("base", "soar")] == [base, soar]


def test_held_out_samples_of_other_encoders_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How far a model's velocity is from the latents of another VAE is a number that means nothing."""
    held_out = tmp_path / "held_out"
    shutil.copytree(shards, held_out)
    info = json.loads((held_out / "dataset.json").read_text())
    (held_out / "dataset.json").write_text(json.dumps({**info, "encoders": {"vae": "another"}}))
    command = ["evaluate", BASE, "--held-out", str(held_out), "--out", str(tmp_path / "metrics.json")]
    assert main(command) == 1 and "was encoded by another vae than" in capsys.readouterr().err


def test_drift_is_measured_without_text_encoders(road: Path, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    for weights in tmp_path.glob("base/text_encoder*/*.safetensors"):
        weights.unlink()
    out = tmp_path / "metrics.json"
    settings = ["--held-out", str(road / "shards"), "--drift-samples", "4", "--drift-steps", "1"]
    command = ["evaluate", str(tmp_path / "base"), *settings, "--out", str(out)]
    assert main(command) == 0
    [measured] = json.loads(out.read_text())["pipelines"].values()
    assert [len(spans) for spans in measured["drift"]["scales"].values()] == [3, 3]


def test_drift_is_measured_on_the_device_of_the_transformer(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(velocity: Any, batches: Iterable[Batch], *arguments: Any) -> list[Any]:
        seen.extend(batch.latents.device.type for batch in batches if batch.latents is not None)
        return []

    monkeypatch.setattr("soar_mega.evaluation.pipeline_drift.held_out_drift", noted)
    monkeypatch.setattr("soar_mega.data.batch.device", lambda: torch.device("meta"))
    arguments = [
        "--held-out",
        str(road / "shards"),
        "--drift-samples",
        "4",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert main(["evaluate", BASE, *arguments]) == 0
    assert set(seen) == {"meta"}


@pytest.mark.slow
def test_torchrun_says_an_error_and_ends_all_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "soar_mega"]
    result = subprocess.run(
        [*command, "train", "recipes/tiny/soar.yaml", "train.sede=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert (
        "[rank 0]: error: command line: unknown key 'train.sede': did you mean train.seed?" in result.stderr
    )
