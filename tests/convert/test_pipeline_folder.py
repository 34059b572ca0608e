"""Whole pipeline folders."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peer_folder import read_tensors, save_small

from soar_mega.convert import (
    WeightFiles,
    load_diffusers,
    pipeline_parts,
    pipeline_schedule,
    save_folder,
    scheduler_shift,
)
from soar_mega.convert.change_form import to_pipeline_folder
from soar_mega.convert.weight_files import INDEX, SINGLE
from soar_mega.convert.weights import open_weights
from soar_mega.models.common.names import named_tensors
from soar_mega.models.family import read_sizes
from soar_mega.outputs import MARKER

BASE = Path(__file__).parents[2] / "recipes/tiny/base"
# of a scheduler, in the order of calculate_shift
DYNAMIC = {"base_image_seq_len": 128, "max_image_seq_len": 1024, "base_shift": 0.4, "max_shift": 1.3}


def files_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "transformer"
    }


def test_only_the_transformer_is_new(tmp_path):
    model = load_diffusers(BASE)
    held = named_tensors(model)

    def changed(name):
        return torch.full_like(held[name], 0.25) if name == "proj_out.bias" else held[name]

    for _ in range(2):  # the second time an older folder is replaced
        save_folder(model, tmp_path / "export", tensors=changed, pipeline_dir=BASE)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    written = files_below(tmp_path / "export")
    assert len(json.loads(written.pop(MARKER))["files"]) == len(written) + 2  # config and weights
    there = files_below(BASE)
    there.pop("training_facts.json")  # which is of the weights that it had
    assert written == there
    assert read_sizes(tmp_path / "export") == model.sizes
    ours, theirs = read_tensors(tmp_path / "export/transformer"), read_tensors(BASE / "transformer")
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == ["proj_out.bias"]
    assert torch.equal(ours["proj_out.bias"], torch.full_like(theirs["proj_out.bias"], 0.25))


def test_an_older_folder_survives_a_failed_export(tmp_path):
    model = load_diffusers(BASE)
    save_folder(model, tmp_path / "export", pipeline_dir=BASE)
    before = files_below(tmp_path / "export")
    with pytest.raises(ValueError, match="nowhere"):
        save_folder(model, tmp_path / "export", pipeline_dir=tmp_path / "nowhere")
    assert files_below(tmp_path / "export") == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_nothing_of_the_users_is_replaced(tmp_path):
    """Folders of the names that a conversion uses for itself, one of an unrelated model, and an export with a note."""
    model = load_diffusers(BASE)
    save_folder(model, tmp_path / "export", pipeline_dir=BASE)
    for name in ("models/note", "out.partial/note", "out.old/note", "export/note", ".x.soar_mega-new/note"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    save_folder(model, tmp_path / "out", pipeline_dir=BASE)
    for target in ("models", "export", "x"):
        with pytest.raises(ValueError, match="did not write"):
            save_folder(model, tmp_path / target, pipeline_dir=BASE)
    for name in ("models/note", "out.partial/note", "out.old/note", "export/note", ".x.soar_mega-new/note"):
        assert (tmp_path / name).read_text() == name


def test_no_mix_with_weights_of_another_layout(tmp_path):
    """diffusers loads the weights that the old index names, not the new file beside it."""
    save_small(tmp_path, max_shard_size="100KB")
    model = load_diffusers(tmp_path)
    before = read_tensors(tmp_path / "transformer")
    with pytest.raises(ValueError, match="did not write"):
        save_folder(model, tmp_path / "transformer", lambda name: torch.zeros(()))
    assert read_tensors(tmp_path / "transformer").keys() == before.keys()
    for size in (50_000, 10**9, 50_000):
        save_folder(model, tmp_path / "ours", files=WeightFiles(max_shard_size=size))
        assert (tmp_path / "ours" / INDEX).exists() == (size == 50_000)
        assert (tmp_path / "ours" / SINGLE).exists() == (size != 50_000)


def copy_of_base(folder):
    shutil.copytree(BASE, folder)
    (folder / "transformer/config.json").chmod(0o644)
    return folder


def test_only_what_the_index_names_is_copied(tmp_path):
    source = copy_of_base(tmp_path / "source")
    for name in (".git/config", "text_encoders/clip_g.safetensors", "sd3.5_medium.safetensors", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("large")
    index = json.loads((source / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (source / "model_index.json").write_text(json.dumps(index))
    save_folder(load_diffusers(source), tmp_path / "export", pipeline_dir=source)
    there = {path.name for path in (tmp_path / "export").iterdir()}
    named = {name for name, kind in index.items() if isinstance(kind, list) and None not in kind}
    assert there == named | {"model_index.json", MARKER}


def test_weights_of_another_architecture_are_not_put_into_a_pipeline(tmp_path):
    out, other = tmp_path / "out", BASE.with_name("flux_base")
    with pytest.raises(ValueError, match="with a FluxTransformer2DModel, and .* of a SD3Transformer2DModel"):
        save_folder(load_diffusers(BASE), out, pipeline_dir=other)
    with (
        open_weights(BASE) as weights,
        pytest.raises(ValueError, match="with a FluxTransformer2DModel, and .* of a SD3Transformer2DModel"),
    ):
        to_pipeline_folder(weights, other, out)
    assert not out.exists()


def test_permissions_are_the_umasks(tmp_path):
    """A pipeline folder that is protected against writing, of which even directories kept their mode bits."""
    source = copy_of_base(tmp_path / "source")
    for path in (*source.rglob("*"), source):
        path.chmod(0o555 if path.is_dir() else 0o400)
    old = os.umask(0o027)
    try:
        save_folder(load_diffusers(source), tmp_path / "export", pipeline_dir=source)
    finally:
        os.umask(old)
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "export").rglob("*")}
    assert modes == {(True, 0o750), (False, 0o640)}


def dangling(source):
    (source / "vae/config.json").unlink()
    (source / "vae/config.json").symlink_to("../../blobs/1234")


def around(source):
    (source / "vae/all").symlink_to("..")


def outside(source):
    (source / "model_index.json").write_text('{"../vae": ["diffusers", "AutoencoderKL"]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dangling, "vae/config.json is a link to ../../blobs/1234, which is missing"),
        (around, "vae/all is a link to a folder around it"),
        (outside, r"names the part ../vae"),
        (lambda source: shutil.rmtree(source / "vae"), "names the part vae, but .* is missing"),
        (lambda source: (source / "model_index.json").write_text("[1]"), r"model_index.json holds \[1\]"),
        (lambda source: (source / "model_index.json").write_text('{"": ["a", "b"]}'), "names the part , but"),
        (lambda source: os.mkfifo(source / "vae/pipe"), "vae/pipe is not a regular file"),
    ],
)
def test_what_is_wrong_with_a_part_is_named(tmp_path, damage, message):
    source = copy_of_base(tmp_path / "source")
    assert sum(pipeline_parts(source).values()) > 10_000
    damage(source)
    with pytest.raises(ValueError, match=message):
        pipeline_parts(source)


def test_scheduler_shift(tmp_path):
    assert scheduler_shift(BASE, 16) == (1.0, False)
    with pytest.raises(ValueError, match="scheduler_config.json cannot be read.*stage.shift"):
        scheduler_shift(tmp_path, 16)
    (tmp_path / "scheduler").mkdir()
    config = tmp_path / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"shift": 3.0}))
    assert scheduler_shift(tmp_path, 16) == (3.0, False)


@pytest.mark.parametrize("samples_evenly", [False, True])  # SD3's pipelines, FLUX's
@pytest.mark.parametrize("shift", [1.0, 3.0, None])  # None: dynamic
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
def test_a_pipeline_s_steps_are_those_of_diffusers(tmp_path, samples_evenly, shift, steps):
    if shift is None:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **DYNAMIC)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.save_pretrained(tmp_path / "scheduler")
    for tokens in (16, 128, 700, 4096):
        mu = {"mu": calculate_shift(tokens, *DYNAMIC.values())} if shift is None else {}
        if samples_evenly:
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], **mu)
        else:
            scheduler.set_timesteps(steps, **mu)
        found = pipeline_schedule(tmp_path, tokens, samples_evenly=samples_evenly).inference_sigmas(steps)
        torch.testing.assert_close(found, scheduler.sigmas.double(), rtol=5e-7, atol=1e-7)


@pytest.mark.parametrize("samples_evenly", [False, True])
def test_a_shift_in_the_place_of_a_dynamic_one_is_constant(tmp_path, samples_evenly):
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "scheduler")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7, sigmas=[1 - i / 7 for i in range(7)] if samples_evenly else None)
    found = pipeline_schedule(tmp_path, 16, samples_evenly=samples_evenly, shift=3.0).inference_sigmas(7)
    torch.testing.assert_close(found, scheduler.sigmas.double(), rtol=5e-7, atol=1e-7)


def test_a_dynamic_shift_that_cannot_be_is_refused(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **DYNAMIC)
    scheduler.save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "scheduler/scheduler_config.json"
    content = json.loads(config.read_text())
    for changes, message in (
        ({"time_shift_type": "linear"}, "time_shift_type 'linear'.*stage.shift"),
        ({"base_image_seq_len": 1024}, "base_image_seq_len is 1024.*below"),
        ({"max_shift": "much"}, "max_shift is 'much'"),
    ):
        config.write_text(json.dumps({**content, **changes}))
        with pytest.raises(ValueError, match=message):
            scheduler_shift(tmp_path, 16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", "DPMSolverMultistepScheduler"),
        ("use_karras_sigmas", True),
        ("invert_sigmas", True),
        ("shift_terminal", 0.02),
        ("num_train_timesteps", 500),
    ],
)
def test_a_scheduler_that_a_shift_does_not_describe_is_refused_by_name(name, value, tmp_path):
    config = json.loads((BASE / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        json.dumps({**config, name: value, "flow_shift": 3})
    )
    with pytest.raises(ValueError, match=f"has {name} .*stage.shift in a recipe and --shift in sample"):
        scheduler_shift(tmp_path, 16)


@pytest.mark.parametrize("shift", [None, "3", 0, -1, True, float("nan"), float("inf"), [3.0]])
def test_a_shift_that_is_none_is_named(tmp_path, shift):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"shift": shift}))
    with pytest.raises(ValueError, match="scheduler_config.json: shift is"):
        scheduler_shift(tmp_path, 16)
