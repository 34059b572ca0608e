"""What a trainer of another repository reads of an export, and what starts it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soar_mega.checkpoints.model_card import notes_of_run
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.cli import main
from soar_mega.handoff import outside
from soar_mega.handoff.check import check, handoff
from soar_mega.handoff.trainers import SD3, TRAINERS, Handoff, script
from soar_mega.models.family import read_sizes
from soar_mega.recipe import recipe_to_yaml
from soar_mega.stages import load_recipe
from soar_mega.training_facts import TrainingFacts, read_facts

BASE = Path(__file__).parents[2] / "recipes/tiny/base"
STAND_IN = Path(__file__).parent / "stand_in_trainer.py"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The built-in one, as an export of a run with 77 T5 tokens."""
    folder = tmp_path / "export"
    shutil.copytree(BASE, folder)
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=77)
    facts = TrainingFacts(dtype="fp32", max_sequence_length=128, width=16, height=16)
    (folder / "training_facts.json").write_text(facts.to_json())
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_files(folder: Path) -> None:
    (folder / "tokenizer_2/vocab.json").unlink()
    (folder / "tokenizer_2/merges.txt").unlink()


def half(folder: Path) -> None:
    assert main(["convert", str(BASE), str(folder / "half"), "--to", "transformer", "--dtype", "bf16"]) == 0
    shutil.move(folder / "half" / Path(WEIGHTS).name, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("trainer", "damage", "stops", "words"),
    [
        ("flow_grpo", lambda f: shutil.rmtree(f / "tokenizer_3"), True, "tokenizer_3 is missing"),
        (
            "flow_grpo",
            lambda f: edit(f / "model_index.json", text_encoder_3=[None, None]),
            True,
            "does without text_enc",
        ),
        ("flow_grpo", without_files, True, "tokenizer_2/ lacks vocab.json and merges.txt"),
        ("flow_factory", without_files, False, "tokenizer_2/ lacks vocab.json and merges.txt"),
        (
            "diffusion_nft",
            lambda f: edit(f / "model_index.json", tokenizer_3=["transformers", "T5Tokenizer"]),
            True,
            "T5TokenizerFast in model_index.json",
        ),
        (
            "unirl",
            lambda f: edit(f / "text_encoder/config.json", max_position_embeddings=10),
            True,
            "has 10 positions",
        ),
        (
            "verl_omni",
            lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
            True,
            "scheduler is a DDIMScheduler",
        ),
        (
            "flow_grpo",
            lambda f: edit(f / "scheduler/scheduler_config.json", use_dynamic_shifting=True),
            True,
            "use_dynamic_shifting",
        ),
        (
            "flow_grpo",
            lambda f: (f / WEIGHTS).rename(f / WEIGHTS.replace(".s", ".fp16.s")),
            True,
            "asks for no variant",
        ),
        ("flow_grpo", half, False, "bf16, rounded from float32: checkpoint.export_dtype=fp32"),
        (
            "flow_grpo",
            lambda f: edit(f / "training_facts.json", max_sequence_length=77),
            False,
            "_length=77/' scripts/",
        ),
        (
            "flow_grpo",
            lambda f: (f / "training_facts.json").unlink(),
            False,
            "nothing says with how many T5 tokens",
        ),
        (
            "flow_grpo",
            lambda f: edit(f / "tokenizer/tokenizer_config.json", model_max_length=10),
            False,
            "says 10 tokens",
        ),
        ("flow_grpo", lambda f: edit(f / "training_facts.json", height=32), False, "16 x 32 pixels"),
    ],
)
def test_what_it_would_stop_at_is_told(
    pipeline: Path, trainer: str, damage: Callable[[Path], object], stops: bool, words: str
) -> None:
    assert check(pipeline, TRAINERS["flow_grpo"]) == []
    damage(pipeline)
    [finding] = [each for each in check(pipeline, TRAINERS[trainer]) if words in each.words]
    assert finding.stops == stops


@pytest.mark.parametrize(
    ("settings", "told"),
    [([], (128, 16, 16)), (["data.max_sequence_length=9", "data.resolution=[16, 8]"], (9, 16, 8))],
)
def test_an_export_of_own_samples_says_how_they_were_drawn(
    pipeline: Path, tmp_path: Path, settings: list[str], told: tuple[int, int, int]
) -> None:
    """What the recipe leaves out is what the pipeline says of itself."""
    run = tmp_path / "run"
    run.mkdir()
    recipe = load_recipe(str(BASE.parent / "flow_grpo.yaml"), [f"model.pipeline_dir={pipeline}", *settings])
    (run / "run_config.yaml").write_text(recipe_to_yaml(recipe))
    for name, text in notes_of_run(RunFolder(run), read_sizes(BASE), 100, "current").items():
        (run / name).write_text(text)
    facts = read_facts(run)
    assert facts is not None and (facts.max_sequence_length, facts.width, facts.height) == told
    assert f"max_sequence_length={told[0]}" in (run / "README.md").read_text()


@pytest.mark.parametrize("name", TRAINERS)
def test_the_lines_are_for_bash_and_their_paths_absolute(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = script(TRAINERS[name], handoff(Path("export"), Path("a folder")))
    subprocess.run(["bash", "-n"], input=lines, text=True, check=True)
    assert str(pipeline) in lines and f"{tmp_path}/a folder" in lines
    assert "16" in lines and all(
        "export" not in word or str(tmp_path) in word for word in lines.split("=")[1:2]
    )


def test_flux_goes_to_the_two_trainers_that_train_it(tmp_path: Path) -> None:
    """With its dynamic shift; of all others it is said who takes it. What they leave fits into the pipeline."""
    pipeline = tmp_path / "export"
    shutil.copytree(BASE.with_name("flux_base"), pipeline)
    edit(pipeline / "tokenizer/tokenizer_config.json", model_max_length=77)
    facts = TrainingFacts(dtype="fp32", max_sequence_length=256, width=16, height=16)
    (pipeline / "training_facts.json").write_text(facts.to_json())
    for name, words in {
        "flow_grpo": "flow_grpo takes 128. In its repository: sed -i 's/max_sequence_length=128/max_sequence_",
        "flow_factory": "flow_factory takes 512. In its repository: sed -i 's/prompt_2=prompt,/prompt_2=prompt, max_s",
    }.items():
        found = check(pipeline, TRAINERS[name])
        assert any(words in each.words for each in found) and not any(each.stops for each in found)
        lines = script(TRAINERS[name], handoff(pipeline, tmp_path / "rl"))
        subprocess.run(["bash", "-n"], input=lines, text=True, check=True)
        assert ("scripts/train_flux.py" in lines) == (name == "flow_grpo") and "sd3" not in lines
    for name in ("diffusion_nft", "unirl", "verl_omni"):
        [finding] = check(pipeline, TRAINERS[name])
        assert (
            finding.stops
            and "FluxPipeline (of the version that was read): flow_grpo and flow_factory do"
            in (finding.words)
        )
    edit(pipeline / "text_encoder/config.json", max_position_embeddings=10)
    assert [each.words for each in check(pipeline, TRAINERS["flow_grpo"]) if each.stops] == [
        "text_encoder has 10 positions, and the trainer pads to 77 tokens: it fails there"
    ]
    shutil.copy(BASE.with_name("flux_base") / "text_encoder/config.json", pipeline / "text_encoder")
    put_in(pipeline, tmp_path)


def put_in(pipeline: Path, tmp_path: Path) -> None:
    """Adapters on all that flow_grpo and Flow-Factory adapt in a FLUX, in the form in which PEFT saves them."""
    of_block = [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")]
    of_block += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    weights = load_file(pipeline / WEIGHTS)
    names = [f"transformer_blocks.0.{part}" for part in of_block] + ["single_transformer_blocks.1.attn.to_q"]
    adapters = {}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        adapters[f"base_model.model.{name}.lora_A.weight"] = torch.full((2, columns), 0.1)
        adapters[f"base_model.model.{name}.lora_B.weight"] = torch.full((rows, 2), 0.1)
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(adapters, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    words = ["--to", "pipeline", "--dtype", "fp32", "--lora", str(folder)]
    assert main(["convert", str(pipeline), str(tmp_path / "merged"), *words]) == 0
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    for name, before in weights.items():
        change = 0.04 if name.removesuffix(".weight") in names else 0.0  # 4 / 2 times 2 x 0.1 x 0.1
        torch.testing.assert_close(merged[name], before + change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_page_shows_the_lines(name: str) -> None:
    folder = Path("/data/runs/x")
    page = one_line((BASE.parents[2] / "docs/handoff.md").read_text())
    for kind, start in TRAINERS[name].starts.items():
        tokens = 77 if kind == SD3 else 256
        out = folder / name
        given = Handoff(
            kind=kind, pipeline=folder / "export", out=out, resolution=512, tokens=tokens, shift=3.0
        )
        commands = [line for line in script(TRAINERS[name], given).splitlines() if not line.startswith("#")]
        assert one_line("\n".join(commands)) in page
        assert start.how_to_set.format(tokens=tokens) in page


def one_line(text: str) -> str:
    return " ".join(text.replace("\\\n", " ").split())


def test_lines_into_a_file_and_a_configuration(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flow-Factory's lines make a configuration of its example."""
    file, repository = tmp_path / "lines.sh", tmp_path / "there"
    words = [
        "handoff",
        str(pipeline),
        "--to",
        "flow_factory",
        "--save",
        str(tmp_path / "rl"),
        "--out",
        str(file),
    ]
    assert main(words) == 0 and main(words) == 0, "a file of its own is replaced"
    example = repository / "examples/grpo/lora/sd3_5/default.yaml"
    example.parent.mkdir(parents=True)
    example.write_text('model:\n  model_name_or_path: "x"  # local path\ntrain:\n  resolution: 512\n')
    program(tmp_path / "bin/ff-train", '#!/bin/sh\ncat "$1"', monkeypatch)
    run = subprocess.run(["bash", file], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout == f'model:\n  model_name_or_path: "{pipeline}"\ntrain:\n  resolution: 16\n'
    file.write_text("mine")
    assert main(words) == 1 and "was not written by this program" in capsys.readouterr().err
    assert main(["handoff", str(tmp_path / "bin"), "--to", "unirl"]) == 1
    assert "is no pipeline folder" in capsys.readouterr().err
    shutil.rmtree(pipeline / "vae")
    assert main(["handoff", str(pipeline), "--to", "unirl"]) == 1
    assert "stops: " in capsys.readouterr().out


def program(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_it_is_run_ended_and_its_adapters_put_into_the_pipeline(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By flow_grpo's own lines; accelerate is a process that saves as flow_grpo does and never ends."""
    monkeypatch.setattr(outside, "LOOK_EVERY", 0.02)
    program(tmp_path / "bin/accelerate", f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"', monkeypatch)
    repository, save = tmp_path / "flow_grpo", tmp_path / "rl"
    repository.mkdir()
    words = ["handoff", str(pipeline), "--to", "flow_grpo", "--save", str(save), "--run-in", str(repository)]
    assert main([*words, "--checkpoints", "2"]) == 0
    told = json.loads((save / "attempt_001/ended.json").read_text())
    assert told["signal"] == "SIGINT" and told["directory"] == str(repository)
    assert not Path(f"/proc/{told['pid']}").exists()
    before, after = load_file(pipeline / WEIGHTS), load_file(save / "pipeline" / WEIGHTS)
    changed = "transformer_blocks.0.attn.to_q.weight"
    newest = len(outside.saved(save / "attempt_001"))
    assert newest >= 2
    delta = torch.full_like(before[changed], 64 / 32 * 32 * 1e-3 * newest)  # alpha / rank, rank, A x B
    torch.testing.assert_close(after[changed] - before[changed], delta, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(after[key], before[key]) for key in before if key != changed)
    facts = json.loads((save / "pipeline/training_facts.json").read_text())
    assert facts["max_sequence_length"] == 128 and facts["dtype"] == "fp32"

    shutil.rmtree(save / "pipeline")
    assert main([*words, "--checkpoints", "2"]) == 0, "what was trained is not trained again"
    assert (save / "pipeline/model_index.json").is_file() and not (save / "attempt_002").exists()

    monkeypatch.setenv("STAND_IN_FAILS", "1")
    assert main([*words, "--checkpoints", "100"]) == 1
    assert "ended with exit code 3 after 1 of 100 checkpoints" in capsys.readouterr().err
    assert main(["handoff", str(pipeline), "--to", "unirl", "--run-in", str(repository)]) == 1
    assert "checkpoints of a form of its own" in capsys.readouterr().err
