"""The encoders give what diffusers' own pipeline gives, bit by bit."""

import gc
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from soar_mega.data import fingerprints as fingerprints_module
from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.loaded_encoders import Encoders
from soar_mega.data.prompts import BATCH, encode_prompts
from soar_mega.data.text_encoder import TextEncoder
from soar_mega.data.vae import Decoder

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
PROMPTS = [
    "a red 3 left of a green 7",
    "",
    "two 4",
    "words that were never seen, and many more of them than ten",
]


def without_t5(folder: Path) -> Path:
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*_3", "training_facts.json"))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def diffusers_prompts(folder: Path, length: int, **absent: None) -> tuple[torch.Tensor, torch.Tensor]:
    diffusers.utils.logging.disable_progress_bar()
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, max_sequence_length=length, do_classifier_free_guidance=False
        )
    return text, pooled


@pytest.mark.parametrize("length", [10, 7])
def test_prompts_are_encoded_as_diffusers_does(length):
    text, pooled = Encoders.from_pipeline(BASE, max_sequence_length=length).encode_prompts(PROMPTS)
    expected_text, expected_pooled = diffusers_prompts(BASE, length)
    assert torch.equal(text, expected_text) and torch.equal(pooled, expected_pooled)
    assert text.shape == (4, 10 + length, 64) and pooled.shape == (4, 64)


def test_a_missing_t5_gives_zeros_as_in_diffusers(tmp_path):
    folder = without_t5(tmp_path / "pipeline")
    text, pooled = Encoders.from_pipeline(folder, max_sequence_length=6).encode_prompts(PROMPTS)
    expected_text, expected_pooled = diffusers_prompts(folder, 6, text_encoder_3=None, tokenizer_3=None)
    assert torch.equal(text, expected_text) and torch.equal(pooled, expected_pooled)
    assert text[:, 10:].eq(0).all()
    assert torch.equal(encode_prompts(folder, PROMPTS, max_sequence_length=6).conditions.text, text)
    assert encoder_facts(folder).text_shape == (10 + 256, 64)


def test_the_default_length_is_what_the_t5_tokenizer_allows():
    facts = encoder_facts(BASE)
    assert facts.max_sequence_length == 10 and facts.text_shape == (20, 64)


def test_prompts_that_are_encoded_once_are_the_same_and_leave_no_encoder(monkeypatch):
    alive = []
    load = TextEncoder.load

    def loaded(*arguments):
        alive.append(living_text_encoders())
        return load(*arguments)

    prompts = [f"{i} times" for i in range(BATCH + 2)]
    text, pooled = Encoders.from_pipeline(BASE, dtype=torch.bfloat16).encode_prompts([*prompts, ""])
    gc.collect()
    before = living_text_encoders()
    monkeypatch.setattr(TextEncoder, "load", loaded)
    once = encode_prompts(BASE, prompts, torch.bfloat16)
    assert alive == [before] * 3 and living_text_encoders() == before
    torch.testing.assert_close(torch.cat([once.conditions.text, once.empty.text]), text)
    torch.testing.assert_close(torch.cat([once.conditions.pooled, once.empty.pooled]), pooled)


def living_text_encoders() -> int:
    return sum(issubclass(type(thing), transformers.PreTrainedModel) for thing in gc.get_objects())


def test_images_are_encoded_and_decoded_with_shift_and_scale():
    encoders, decoder = Encoders.from_pipeline(BASE, text=False), Decoder.load(BASE)
    vae = diffusers.AutoencoderKL.from_pretrained(BASE / "vae")
    config = vae.config
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    mean, std = encoders.encode_images(images)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.mean).sample
    assert config.shift_factor and config.scaling_factor != 1, "the test needs factors that matter"
    torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, posterior.mean)
    torch.testing.assert_close(std / config.scaling_factor, posterior.std)
    torch.testing.assert_close(decoder.decode(mean), (decoded * 0.5 + 0.5).clamp(0, 1))
    assert mean.shape == (2, 4, 8, 6)


def test_bf16_concerns_the_text_encoders_alone():
    encoders = Encoders.from_pipeline(BASE, dtype=torch.bfloat16)
    text, pooled = encoders.encode_prompts(["two 4"])
    mean, _ = encoders.encode_images(torch.zeros(1, 3, 16, 16))
    assert text.dtype == pooled.dtype == torch.bfloat16 and mean.dtype == torch.float32


def test_a_fingerprint_changes_with_weights_and_config_and_only_then(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(BASE, folder)
    before = fingerprints(folder)
    assert before == fingerprints(BASE) and set(before) == {
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    }
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    config = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    settings |= {"backend": "another", "pad_token": {"content": settings["pad_token"]}}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    words = json.loads((folder / "tokenizer_3" / "tokenizer.json").read_text())
    words["model"]["unk_id"] = 5
    (folder / "tokenizer_3" / "tokenizer.json").write_text(json.dumps(words))
    after = fingerprints(folder)
    changed = {part for part in before if before[part] != after[part]}
    assert changed == {"vae", "text_encoder_2", "tokenizer_3"}


def test_the_same_encoder_in_several_files_has_the_same_fingerprint(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "p")
    folder = tmp_path / "p" / "text_encoder_3"
    model = transformers.T5EncoderModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    shutil.copy(BASE / "text_encoder_3" / "config.json", folder)
    opened = []

    def opening(path, mode):
        opened.append(path)
        return path.open(mode)

    monkeypatch.setattr(fingerprints_module, "open", opening, raising=False)
    assert fingerprints(tmp_path / "p") == fingerprints(BASE)
    assert len(opened) == len(set(opened))  # as every rank of a run does it


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "text_encoder_3", "transformer"])
def test_a_missing_part_is_named(tmp_path, part):
    shutil.copytree(BASE, tmp_path / "p", ignore=shutil.ignore_patterns(part))
    with pytest.raises(ValueError, match=f"{part}/config.json cannot be read"):
        encoder_facts(tmp_path / "p")


def edited(folder: Path, name: str, **changes: object) -> Path:
    """A copy of the tiny pipeline with other values in one of its JSON files."""
    shutil.copytree(BASE, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).chmod(0o644)
    (folder / name).write_text(json.dumps({**content, **changes}))
    if name != "training_facts.json":
        (folder / "training_facts.json").unlink()  # whose length would go before the tokenizer's
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 10**30},
            "model_max_length is 1000.*from 1 to 77 is",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
        ("tokenizer_3/tokenizer_config.json", {"model_max_length": [7]}, r"model_max_length is \[7\]"),
        ("tokenizer_3/tokenizer_config.json", {"model_max_length": -1}, "model_max_length is -1"),
        ("text_encoder_2/config.json", {"projection_dim": None}, "projection_dim is None"),
        ("transformer/config.json", {"patch_size": True}, "patch_size is True"),
        ("transformer/config.json", {"sample_size": 0}, "sample_size is 0"),
        ("vae/config.json", {"block_out_channels": 4}, "block_out_channels is 4"),
        ("vae/config.json", {"latent_channels": "4"}, "latent_channels is '4'"),
        ("model_index.json", {"text_encoder_3": "T5"}, "text_encoder_3 is 'T5'"),
        (
            "model_index.json",
            {"text_encoder_3": ["transformers", 5]},
            r"text_encoder_3 is \['transformers', 5\]",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_file(tmp_path, name, changes, words):
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        encoder_facts(edited(tmp_path / "p", name, **changes))


def test_a_t5_without_a_limit_of_its_own_has_diffusers(tmp_path):
    for i, length in enumerate((10**30, 1e30)):
        folder = edited(tmp_path / f"{i}", "tokenizer_3/tokenizer_config.json", model_max_length=length)
        assert encoder_facts(folder).max_sequence_length == 256


def test_an_export_is_read_as_it_was_trained(tmp_path):
    folder = edited(tmp_path / "p", "training_facts.json", max_sequence_length=7)
    assert encoder_facts(folder).max_sequence_length == 7
    assert encoder_facts(folder, 9).max_sequence_length == 9
    for content, words in (
        ('{"max_sequence_length": 7}', " is not what soar-mega writes there"),
        ('{"max_sequence_length": "7"}', ": max_sequence_length is '7', a whole number"),
    ):
        (folder / "training_facts.json").write_text(content)
        with pytest.raises(ValueError, match=f"training_facts.json{words}"):
            encoder_facts(folder)


@pytest.mark.parametrize("content", ["[]", "{", "\ufeff", '"' + "a" * 1000 + '"', "[" * 100_000])
def test_a_config_that_is_none_is_named(tmp_path, content):
    folder = edited(tmp_path / "p", "vae/config.json")
    (folder / "vae/config.json").write_text(content)
    with pytest.raises(ValueError, match=r"vae/config\.json (holds|is not valid JSON)") as error:
        encoder_facts(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("length", [-3, 0, 513])
def test_a_prompt_has_a_possible_length(length):
    with pytest.raises(ValueError, match=f"max_sequence_length is {length}: it must be between 1 and 512"):
        encoder_facts(BASE, length)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer_3": None}, "names no tokenizer_3"),
        ({"tokenizer_3": [None, None]}, "names no tokenizer_3"),
        ({"text_encoder": ["transformers", "NoSuchClass"]}, "'NoSuchClass', which is no class"),
        ({"text_encoder": ["transformers", "logging"]}, "'logging', which is no class"),
    ],
)
def test_a_class_that_is_none_is_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=rf"model_index\.json.*{words}"):
        encode_prompts(edited(tmp_path / "p", "model_index.json", **changes), ["a"])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1389\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text_encoder_2/model.safetensors", POINTER, "model.safetensors is a Git LFS pointer.*git lfs pull"),
        ("text_encoder_2/model.safetensors", "", "text_encoder_2 cannot be loaded: "),
        ("tokenizer_3/tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer"),
        ("tokenizer/tokenizer.json", "[]", "tokenizer cannot be loaded: "),
        ("vae/diffusion_pytorch_model.safetensors", POINTER, "is a Git LFS pointer"),
        ("vae/config.json", POINTER, "config.json is a Git LFS pointer"),
    ],
)
def test_weights_that_cannot_be_loaded_are_named(tmp_path, name, content, words):
    folder = edited(tmp_path / "p", "vae/config.json")
    (folder / name).chmod(0o644)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        Encoders.from_pipeline(folder)
    assert str(folder / name.partition("/")[0]) in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"scaling_factor": None}, {"shift_factor": "much"}, {"scaling_factor": [1]}]
)
def test_scales_of_latents_are_numbers(tmp_path, changes):
    with pytest.raises(
        ValueError, match=rf"vae/config\.json: {next(iter(changes))} is .* a number is expected"
    ):
        Decoder.load(edited(tmp_path / "p", "vae/config.json", **changes))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_3"])
def test_encoders_with_broken_weights_are_refused_by_name(tmp_path, part):
    shutil.copytree(BASE, tmp_path / "p")
    file = next((tmp_path / "p" / part).glob("*.safetensors"))
    tensors = load_file(file)
    key = max(tensors)
    tensors[key].view(-1)[-1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} hold NaN or infinite numbers: "):
        Encoders.from_pipeline(tmp_path / "p")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_a_text_encoder_without_some_of_its_weights_is_named(tmp_path, part):
    shutil.copytree(BASE, tmp_path / "p")
    file = next((tmp_path / "p" / part).glob("*.safetensors"))
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("weight") and "layer" in name.lower())
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} cannot be loaded: the weights lack .*1 missing in all"):
        Encoders.from_pipeline(tmp_path / "p").encode_prompts(["a"])


def test_a_vae_without_some_of_its_weights_is_named(tmp_path):
    folder = edited(tmp_path / "p", "vae/config.json", layers_per_block=3)
    with pytest.raises(ValueError, match="vae cannot be loaded: the weights lack .*config.json implies"):
        Encoders.from_pipeline(folder, text=False)


def test_prompts_that_are_cut_are_counted(caplog):
    encode_prompts(BASE, ["a red 3", "a red 3 left of a green 7 above a blue 2 left of a white 1"])
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert [f"1 of 2 prompts are longer than {part} takes" in caplog.text for part in parts] == [True] * 3
