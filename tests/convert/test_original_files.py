"""Single files in the families' own layouts, against diffusers' functions that read them: equal to the bit."""

import types

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from peer_folder import SMALL, read_tensors
from safetensors.torch import load_file

from soar_mega.convert.change_form import to_original_file, to_transformer_folder
from soar_mega.convert.original_file import PREFIX, OriginalFile, OriginalWriter, config_of
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.weights import open_weights
from soar_mega.models.family import read_sizes
from soar_mega.models.flux.original import ORIGINAL as FLUX

FLUX_SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 2, 4),
}


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
    tensors, config = model.state_dict(), {k: v for k, v in model.config.items() if k[0] != "_"}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    file = tmp_path / "x.safetensors"
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    family = types.SimpleNamespace(original=FLUX)
    sizes = types.SimpleNamespace(family=family, to_diffusers=lambda: config)
    writer = OriginalWriter(file, sizes, shapes, dtypes, prefix)
    for key in reversed(shapes):  # any order
        writer.write(key, tensors[key])
    writer.close()
    assert equal(diffusers_flux(32)(load_file(file)), tensors)
    with Reader(file) as reader:
        told = config_of(reader, FLUX, prefix, {"axes_dims_rope": [2, 2, 4]})
        assert told.pop("_class_name") == "FluxTransformer2DModel"
        assert told == {**config, "axes_dims_rope": [2, 2, 4]}
        back = OriginalFile(reader, FLUX, prefix, told, shapes)
        read = {key: torch.cat([block for _, block in back.blocks(key)]) for key in shapes}
    assert equal(read, tensors)
