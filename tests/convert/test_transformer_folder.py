"""Weights from and to diffusers' transformer folders: bitwise, at any layout, without holding a whole model."""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from multirank import run_ranks
from peer_folder import SMALL, read_tensors, save_small

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import WeightFiles, load_diffusers, load_weights, save_folder
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.weight_files import INDEX, SINGLE
from soar_mega.models.common.build import build_model
from soar_mega.models.common.chunks import build_chunks
from soar_mega.models.common.names import named_tensors
from soar_mega.models.family import read_sizes
from soar_mega.models.sd3.sizes import SD3Sizes


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("shard_in", "shard_out"), [("5GB", 10**9), ("100KB", 50_000)])
def test_round_trip_is_bitwise(dtype, shard_in, shard_out, tmp_path):
    from diffusers import SD3Transformer2DModel

    save_small(tmp_path, dtype=dtype, max_shard_size=shard_in)
    assert (tmp_path / "transformer" / INDEX).exists() == (shard_in != "5GB")
    model = load_diffusers(tmp_path, dtype=dtype)
    save_folder(model, tmp_path / "ours", files=WeightFiles(max_shard_size=shard_out))
    assert (tmp_path / "ours" / INDEX).exists() == (shard_out < 10**9)
    assert equal(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "transformer"))
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert again.config.dual_attention_layers == [0, 2] and again.config.qk_norm == "rms_norm"


def save_from_layout(folder, parallel):
    """Load into a layout and save again -> elements read, elements held, the largest tensor read."""
    from soar_mega import distributed

    distributed.start_world(parallel)
    config = read_sizes(folder)
    model = build_chunks(config, ModelConfig(dtype="fp32"), parallel)
    sizes, earlier = [], []
    read = Reader.read

    def counting(self, *args):
        assert all(tensor() is None for tensor in earlier), "each is in its place before the next is read"
        tensor = read(self, *args)
        sizes.append(tensor.numel())
        earlier.append(weakref.ref(tensor))
        return tensor

    Reader.read = counting
    load_weights(model, folder)
    held = [*model.parameters(), *model.buffers()]
    save_folder(model, folder / "ours", files=WeightFiles(max_shard_size=50_000))
    ours = named_tensors(model)
    save_folder(
        model, folder / "ema", lambda name: torch.full_like(ours[name], 0.5) if "mlp" in name else ours[name]
    )
    return sum(sizes), sum(t.numel() for t in held), max(sizes)


def test_round_trip_through_tp2_pp2_dp1_reads_each_element_once(tmp_path):
    save_small(tmp_path, max_shard_size="100KB")
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    results = run_ranks(save_from_layout, 4, tmp_path, parallel, timeout=100)
    original = read_tensors(tmp_path / "transformer")
    assert equal(read_tensors(tmp_path / "ours"), original)
    for read, held, largest in results:
        assert read == held
        assert largest <= max(tensor.numel() for tensor in original.values())
    ema = read_tensors(tmp_path / "ema")
    for key, tensor in original.items():
        wanted = torch.full_like(tensor, 0.5) if ".ff" in key else tensor
        assert torch.equal(ema[key], wanted), key


def test_round_trip_with_interleaved_chunks_and_data_parallel_replicas(tmp_path):
    save_small(tmp_path)
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    run_ranks(save_from_layout, 4, tmp_path, parallel, timeout=100)
    assert equal(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "transformer"))


def fail_to_save(folder):
    from soar_mega import distributed

    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    distributed.start_world(parallel)
    settings = ModelConfig(dtype="fp32", init="random")
    model = build_model(SD3Sizes(**SMALL), settings, parallel)
    messages = []
    for attempt in (limit_file_size, lambda: None):
        attempt()
        try:
            save_folder(model, folder / ("ours" if attempt is limit_file_size else "file/below"))
        except OSError as error:
            messages.append(str(error))
    return messages


def limit_file_size():
    """A full disk as this process sees it: files cannot grow beyond 50 kB."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_failed_write_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    mine, theirs = run_ranks(fail_to_save, 2, tmp_path, timeout=60)
    assert "File too large" in mine[0] and "File exists" in mine[1]
    assert all("rank 0 could not write" in message for message in theirs) and len(theirs) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # what there was of it is removed


def edit_config(folder, **changes):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, edit):
    from safetensors.torch import save_file

    tensors = read_tensors(folder / "transformer")
    edit(tensors)
    save_file(tensors, folder / "transformer" / SINGLE)


def truncate(folder):
    path = folder / "transformer" / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder):
    shutil.rmtree(folder / "transformer")
    save_small(folder, max_shard_size="100KB")
    next((folder / "transformer").glob("*-00002-of-*")).unlink()


def write_index(folder, weight_map):
    (folder / "transformer" / SINGLE).unlink()
    (folder / "transformer" / INDEX).write_text(json.dumps({"weight_map": weight_map}))


BROKEN = {
    "missing": (
        lambda f: edit_weights(f, lambda t: t.pop("context_embedder.bias")),
        r"missing: context_embedder.bias \(32,\)",
    ),
    "unknown": (
        lambda f: edit_weights(f, lambda t: t.update(strange=torch.zeros(1))),
        f"unknown: strange in {SINGLE}",
    ),
    "shape": (
        lambda f: edit_weights(f, lambda t: t.update({"proj_out.bias": torch.zeros(7)})),
        rf"shape of proj_out.bias in {SINGLE} is \(7,\), config.json implies \(16,\)",
    ),
    "nan": (
        lambda f: edit_weights(f, lambda t: t["proj_out.bias"].fill_(torch.nan)),
        f"hold NaN or infinite numbers: proj_out.bias in {SINGLE}",
    ),
    "twice": (
        lambda f: (f / "transformer" / INDEX).write_text("{}"),
        f"holds weights twice, {SINGLE} and {INDEX}",
    ),
    "truncated": (truncate, f"{SINGLE} cannot be read, it may be truncated"),
    "shard": (lose_a_shard, "00002-of-.* cannot be read"),
    "no weights": (
        lambda f: (f / "transformer" / SINGLE).unlink(),
        f"neither {SINGLE} nor .*found: config.json",
    ),
    "index": (
        lambda f: (
            (f / "transformer" / SINGLE).unlink(),
            (f / "transformer" / INDEX).write_text("[]"),
        ),
        r"holds \[\] instead of a JSON object",
    ),
    "class": (
        lambda f: edit_config(f, _class_name="Lumina2Transformer2DModel"),
        "describes a Lumina2Transformer2DModel",
    ),
    "setting": (lambda f: edit_config(f, rope_theta=3), "does not know: rope_theta"),
    "sizes": (lambda f: edit_config(f, num_attention_heads=8), "config.json: caption_projection_dim is 32"),
    "json": (lambda f: (f / "transformer" / "config.json").write_text("{"), "is not valid JSON"),
    "json list": (
        lambda f: (f / "transformer" / "config.json").write_text("[]"),
        "holds .. instead of a JSON object",
    ),
    "text": (lambda f: edit_config(f, num_layers="24"), "config.json: num_layers is '24'"),
    "null": (lambda f: edit_config(f, patch_size=None), "config.json: patch_size is None"),
    "huge": (lambda f: edit_config(f, num_layers=10**30), "config.json: num_layers is 1000"),
    "zero": (lambda f: edit_config(f, attention_head_dim=0), "config.json: attention_head_dim is 0"),
    "layers": (lambda f: edit_config(f, dual_attention_layers=5), "dual_attention_layers is 5"),
    "layer": (lambda f: edit_config(f, dual_attention_layers=["a"]), r"dual_attention_layers is \['a'\]"),
    "pointer": (
        lambda f: (f / "transformer" / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"{SINGLE} is a Git LFS pointer",
    ),
    "map": (lambda f: write_index(f, ["a"]), "has no weight_map"),
    "number": (lambda f: write_index(f, {"a": 3}), "says that a is in 3, which is no file"),
    "outside": (lambda f: write_index(f, {"a": "../x.safetensors"}), "says that a is in '../x.safetensors'"),
    "no config": (lambda f: shutil.rmtree(f / "transformer"), "holds no transformer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_named(case, tmp_path):
    damage, message = BROKEN[case]
    save_small(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_diffusers(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_many_problems_are_counted(tmp_path):
    save_small(tmp_path)
    edit_weights(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors)[:15]])
    with pytest.raises(ValueError, match="and 5 more"):
        load_diffusers(tmp_path)


def test_plain_python_process_without_diffusers(tmp_path):
    save_small(tmp_path)
    script = f"""
import sys, torch
from soar_mega.convert import WeightFiles, load_diffusers
model = load_diffusers({str(tmp_path)!r})
velocity = model(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, 999.0]), torch.zeros(2, 3, 12), torch.zeros(2, 10))
velocity.sum().backward()
assert velocity.shape == (2, 4, 8, 8) and "diffusers" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
