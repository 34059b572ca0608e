"""Weights in every form that can be read, each with one thing wrong: refused by `soar-mega convert`, which names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peer_folder import FLUX_SMALL, SMALL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from soar_mega.cli import main
from soar_mega.convert import weights
from soar_mega.convert.change_form import to_original_file
from soar_mega.convert.weights import open_weights

SD3_KEY, FLUX_KEY = "transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.1.attn.to_q.weight"


def pipeline(folder: Path, max_shard_size: str = "5GB") -> str:
    SD3Transformer2DModel(**SMALL).save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    (folder / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "SD3Transformer2DModel"]})
    )
    return SD3_KEY


def sharded(folder: Path) -> str:
    return pipeline(folder, "30KB")


def transformer(folder: Path) -> str:
    FluxTransformer2DModel(**FLUX_SMALL).save_pretrained(folder)
    return FLUX_KEY


def single(model: torch.nn.Module, key: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        model.save_pretrained(folder / "t")  # type: ignore[operator]
        with open_weights(folder / "t") as stored:
            to_original_file(stored, folder / "x.safetensors")
        shutil.rmtree(folder / "t")
        return key

    return write


def adapters(name: str, prefix: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        modules = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
        factors = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
        stored = {f"{prefix}{m}.lora_{k}.weight": t.clone() for m in modules for k, t in factors.items()}
        save_file(stored, folder / name)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
        return f"{prefix}{modules[0]}.lora_A.weight"

    return write


FORMS: dict[
    str, Callable[[Path], str]
] = {  # writes into a folder -> the tensor that something will be wrong with
    "pipeline": pipeline,
    "sharded": sharded,
    "transformer": transformer,
    "sd3 file": single(SD3Transformer2DModel(**SMALL), "joint_blocks.1.x_block.attn.qkv.weight"),
    "flux file": single(
        FluxTransformer2DModel(
            **FLUX_SMALL
            | {"attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)}
        ),
        "single_blocks.1.linear1.weight",
    ),
    "peft": adapters("adapter_model.safetensors", "base_model.model."),
    "diffusers lora": adapters("pytorch_lora_weights.safetensors", "transformer."),
}


def strange(key: str) -> str:
    """A name beside that of a tensor, which no model has."""
    return key.replace("to_q", "to_x").replace("qkv", "x").replace("linear1", "x")


def poison(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key][0, 0] = torch.nan


def rename_all(tensors: dict[str, Tensor], key: str) -> None:
    for name in list(tensors):
        tensors[name.replace("blocks.", "stages.")] = tensors.pop(name)


DAMAGES: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "missing": lambda tensors, key: tensors.pop(key),
    "extra": lambda tensors, key: tensors.update({strange(key): tensors[key].clone()}),
    "misshaped": lambda tensors, key: tensors.update({key: tensors[key][:, :-1].clone()}),
    "nan": poison,
    "truncated": lambda tensors, key: None,
    "unknown": rename_all,
}


def damage(folder: Path, key: str, what: str) -> Path:
    """Do it to the file that holds the tensor."""
    configs = list(folder.rglob("config.json"))
    if what == "unknown" and configs:
        content = json.loads(configs[0].read_text())
        configs[0].write_text(json.dumps(content | {"_class_name": "Lumina2Transformer2DModel"}))
        return configs[0]
    files = {file: load_file(file) for file in folder.rglob("*.safetensors")}
    [(file, tensors)] = [(file, tensors) for file, tensors in files.items() if key in tensors]
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    DAMAGES[what](tensors, key)
    save_file(tensors, file, metadata)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    return file


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_refused_by_name(
    form: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    key = FORMS[form](folder)
    file = damage(folder, key, what)
    source, options = folder, ["--to", "transformer"]
    if "file" in form:
        source = file
    if "lora_A" in key:
        source = tmp_path / "base"
        SD3Transformer2DModel(**SMALL).save_pretrained(source)
        options += ["--lora", str(file)]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 1
    said = capsys.readouterr().err
    assert str(file.parent) in said and (file.name in said or what == "missing")
    named = {"missing": key, "extra": strange(key), "misshaped": key, "nan": key}.get(what, "")
    if "lora_A" in key:  # the linear that the adapter hangs on
        named = named.partition(".lora_A")[0].rpartition("transformer_")[2]
    assert named in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_nan_is_not_converted_and_not_drawn_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(__file__).parents[2] / "recipes/tiny/flux_base"
    shutil.copytree(base / "transformer", tmp_path / "t")
    [file] = (tmp_path / "t").glob("*.safetensors")
    tensors = load_file(file)
    poison(tensors, FLUX_KEY)
    save_file(tensors, file, {"format": "pt"})
    with monkeypatch.context() as patch:
        patch.setattr(weights, "is_finite", lambda tensor: True)
        assert main(["convert", str(tmp_path / "t"), str(tmp_path / "run")]) == 0
    for verb in (["convert"], ["sample", "--pipeline-dir", str(base), "--prompt", "a red 3"]):
        out = ["--out", str(tmp_path / "out.png")] if verb[0] == "sample" else [str(tmp_path / "out")]
        assert main([verb[0], str(tmp_path / "run"), *out, *verb[1:]]) == 1
        said = capsys.readouterr().err
        assert "hold NaN or infinite numbers: layers.3.attention.linear_qkv.weight" in said
        assert f"{tmp_path}/run/iter_0000000" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t"]
