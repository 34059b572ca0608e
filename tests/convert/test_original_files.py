"""Single files in the families' own layouts, against diffusers' functions that read them: equal to the bit."""

import types

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from peer_folder import FLUX_SMALL, SMALL, read_tensors
from safetensors.torch import load_file, save_file

from soar_mega.cli import main
from soar_mega.convert import WeightFiles
from soar_mega.convert.change_form import to_original_file, to_transformer_folder
from soar_mega.convert.original_file import PREFIX
from soar_mega.convert.weight_files import index_name, single_name
from soar_mega.convert.weights import open_weights
from soar_mega.models.family import read_sizes


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours
    )


def random_model(model, dtype):
    """Every tensor different, in biases and norms too."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    return model.to(dtype)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, torch.bfloat16), ({"qk_norm": None, "dual_attention_layers": ()}, torch.float16)],
    ids=["dual", "plain"],
)
def test_sd3_files_are_what_diffusers_reads(tmp_path, changes, dtype, prefix):
    torch.manual_seed(0)
    model = random_model(SD3Transformer2DModel(**SMALL | changes), dtype)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="50KB")
    file = tmp_path / "any name.safetensors"
    with open_weights(tmp_path / "transformer") as weights:
        to_original_file(weights, file, prefix=prefix)
    if prefix:  # a file of a whole pipeline, with types in its other parts that no transformer has
        others = {"text_encoders.t5xxl.scaled_fp8": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}
        others["text_encoders.clip_l.position_ids"] = torch.zeros(1, 2, dtype=torch.int64)
        save_file(load_file(file) | others, file)
    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(load_file(file))
    assert equal(theirs, model.state_dict())
    with open_weights(file, tmp_path) as weights:
        to_transformer_folder(weights, tmp_path / "back")
    assert equal(read_tensors(tmp_path / "back"), model.state_dict())
    assert read_config(tmp_path / "back") == read_config(tmp_path / "transformer")


def read_config(folder):
    return read_sizes(folder / "config.json")


def diffusers_flux(hidden):
    """diffusers' function, whose split of linear1 is written for a hidden size of 3072."""
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(hidden if value == 3072 else value for value in function.__code__.co_consts)
    assert constants != function.__code__.co_consts
    return types.FunctionType(function.__code__.replace(co_consts=constants), function.__globals__)


@pytest.mark.parametrize(("guidance", "prefix"), [(True, ""), (False, PREFIX)])
def test_flux_files_are_what_diffusers_reads(tmp_path, guidance, prefix):
    torch.manual_seed(0)
    model = random_model(FluxTransformer2DModel(**FLUX_SMALL, guidance_embeds=guidance), torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", variant="bf16")
    file = tmp_path / "x.safetensors"
    with open_weights(tmp_path / "transformer") as weights:
        to_original_file(weights, file, prefix=prefix)
    assert equal(diffusers_flux(32)(load_file(file)), model.state_dict())
    with open_weights(file, tmp_path) as weights:
        to_transformer_folder(weights, tmp_path / "back", WeightFiles(max_shard_size=50_000, variant="bf16"))
    assert (tmp_path / "back" / index_name("bf16")).is_file()
    assert equal(read_tensors(tmp_path / "back"), model.state_dict())
    again = FluxTransformer2DModel.from_pretrained(
        tmp_path / "back", variant="bf16", torch_dtype=torch.bfloat16
    )
    assert equal(again.state_dict(), model.state_dict())
    assert read_config(tmp_path / "back") == read_config(tmp_path / "transformer")


@pytest.mark.parametrize(
    "model", [SD3Transformer2DModel(**SMALL), FluxTransformer2DModel(**FLUX_SMALL)], ids=["sd3", "flux"]
)
def test_a_checkpoint_is_one_of_the_forms(tmp_path, model):
    """diffusers -> checkpoint -> single file -> checkpoint -> diffusers, by the command."""
    random_model(model, torch.bfloat16).save_pretrained(tmp_path / "t")
    places = ["t", "one", "x.safetensors", "two", "back"]
    to = [
        [],
        ["--to", "original", "--prefix", PREFIX],
        ["--to", "checkpoint", "--pipeline-dir", str(tmp_path / "t")],
    ]
    for source, out, options in zip(places, places[1:], [*to, ["--variant", "fp32"]], strict=False):
        assert main(["convert", str(tmp_path / source), str(tmp_path / out), *options]) == 0
    back = load_file(tmp_path / "back" / single_name("fp32"))
    assert equal(back, {key: tensor.float() for key, tensor in model.state_dict().items()})
    assert (
        main(
            [
                "convert",
                str(tmp_path / "back"),
                str(tmp_path / "half"),
                "--to",
                "transformer",
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    assert equal(read_tensors(tmp_path / "half"), model.state_dict())


def broken(change):
    """A single file with one thing wrong."""

    def write(tensors, file):
        change(tensors)
        save_file(tensors, file)

    return write


X = PREFIX + "joint_blocks.1.x_block.attn.qkv.weight"
# beside what tests/convert/test_damaged_forms.py does to every form
BROKEN = {
    "missing size": (broken(lambda t: t.pop(PREFIX + "pos_embed")), f"{PREFIX}pos_embed is missing"),
    "stranger": (broken(lambda t: t.update(strange=torch.zeros(1))), "holds strange"),
    "wrong rank": (
        broken(lambda t: t.update({PREFIX + "context_embedder.weight": torch.zeros(5)})),
        "context_embedder.weight has the shape",
    ),
    "type": (broken(lambda t: t.update({X: torch.zeros(96, 32, dtype=torch.int64)})), f"{X} holds I64"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, case):
    write, message = BROKEN[case]
    SD3Transformer2DModel(**SMALL).save_pretrained(tmp_path / "t")
    file = tmp_path / "x.safetensors"
    with open_weights(tmp_path / "t") as weights:
        to_original_file(weights, file, prefix=PREFIX)
    tensors = load_file(file)
    tensors["first_stage_model.decoder.weight"] = torch.zeros(1)  # of another part, which is left out
    write(tensors, file)
    with pytest.raises(ValueError, match=message) as caught, open_weights(file) as weights:
        to_transformer_folder(weights, tmp_path / "out")
    assert str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_fp16_cannot_hold_and_a_file_of_another_model_are_refused(tmp_path):
    model = SD3Transformer2DModel(**SMALL)
    with torch.no_grad():
        model.proj_out.bias[3] = 1e5
    model.save_pretrained(tmp_path / "t")
    with (
        open_weights(tmp_path / "t") as weights,
        pytest.raises(ValueError, match="proj_out.bias holds .*65504"),
    ):
        to_transformer_folder(weights, tmp_path / "out", WeightFiles(dtype=torch.float16))
    with open_weights(tmp_path / "t") as weights:
        to_original_file(weights, tmp_path / "x.safetensors")
    SD3Transformer2DModel(**SMALL | {"num_layers": 3}).save_pretrained(tmp_path / "other")
    opened = open_weights(tmp_path / "x.safetensors", tmp_path / "other")
    with pytest.raises(ValueError, match="are of different models: .*num_layers 4 and 3"), opened:
        pass
