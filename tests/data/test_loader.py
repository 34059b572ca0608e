"""The loader in one process: exact resume, failed samples, and data sets that do not fit."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged_pictures import damaged_pictures
from data_fixtures import make_sample, make_samples, make_shards
from PIL import Image

from soar_mega.config import DataConfig
from soar_mega.data.info import DataError
from soar_mega.data.loader import Loader
from soar_mega.data.prepare import prepare
from soar_mega.data.shards import open_shards

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
TENSORS = ("latents", "text", "pooled", "empty_text", "empty_pooled", "position", "valid")


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards", make_samples(20))


@pytest.fixture
def loader(shards):
    made = []

    def make(path=shards, seed=42, size=4, pipeline_dir="", sizes=None, **data):
        made.append(
            Loader(DataConfig(path=str(path), **data), seed, size, pipeline_dir=pipeline_dir, sizes=sizes)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS) and a.names == b.names


def damage(shards, numbers, part="latents"):
    """Flip a bit of a part of these samples."""
    for index_path in sorted(shards.glob("shard-*.json")):
        content = bytearray(index_path.with_suffix(".tar").read_bytes())
        for sample in json.loads(index_path.read_text())["samples"]:
            if int(sample["key"]) in numbers:
                offset, size, _ = sample[part]
                content[offset + size - 1] ^= 1
        index_path.with_suffix(".tar").write_bytes(content)


def test_batches_are_whole_and_in_sequence(loader):
    one = loader()
    for step in range(6):
        batch = next(one)
        assert batch.position.tolist() == list(range(4 * step, 4 * step + 4))
        assert batch.valid.all() and len(batch.names) == 4 and batch.text_length == 5
        assert batch.latents.shape == (4, *batch.latent_shape) and batch.latent_shape in [
            (4, 8, 8),
            (4, 10, 6),
        ]
        # Text and latents are those of the sample that the name says.
        numbers = [float(name.split("image")[1].split(".png")[0]) for name in batch.names]
        assert batch.text[:, 0, 0].tolist() == batch.pooled[:, 0].tolist() == numbers
        torch.testing.assert_close(batch.latents.mean((1, 2, 3)), torch.tensor(numbers), rtol=0, atol=0.2)
        assert (batch.latents.std((1, 2, 3)) - 0.5).abs().max() < 0.1
    assert one.consumed_samples == 24


def test_reader_processes_change_nothing(loader):
    here, there = loader(num_workers=0), loader(num_workers=2)
    for _ in range(12):
        assert same(next(here), next(there)) and here.indices() == there.indices()
    assert here._order._epochs and not there._order._epochs  # of many samples these take time and memory


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_bitwise(loader, workers):
    one = loader(num_workers=workers)
    for _ in range(5):
        next(one)
    state = json.loads(json.dumps(one.state_dict()))
    resumed = loader(num_workers=workers)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(same(next(one), next(resumed)) for _ in range(8))
    assert one.state_dict() == resumed.state_dict()


def test_a_resume_with_another_batch_size_uses_all_samples_evenly(loader, shards):
    uses: dict[str, int] = {}
    state = None
    for size, steps in [(4, 5), (6, 7), (1, 9), (5, 13)]:
        one = loader(size=size)
        if state:
            one.load_state_dict(state)
        for _ in range(steps):
            for name in next(one).names:
                uses[name] = uses.get(name, 0) + 1
        state = one.state_dict()
    by_bucket: dict[int, list[int]] = {}
    for name, count in uses.items():
        number = int(name.split("image")[1].split(".png")[0])
        by_bucket.setdefault(min(number % 3, 1), []).append(count)
    assert state["consumed_samples"] == sum(uses.values()) == 136
    assert all(max(counts) - min(counts) <= 1 for counts in by_bucket.values()) and len(uses) == 20


def test_a_state_of_another_data_set_or_seed_is_refused(loader, tmp_path):
    state = loader().state_dict()
    other = make_shards(tmp_path / "other", [make_sample(i) for i in range(3)])
    with pytest.raises(ValueError, match="this one has.*16x16': 3.*finetune"):
        loader(path=other).load_state_dict(state)
    with pytest.raises(ValueError, match="train.seed=42, not 1"):
        loader(seed=1).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_failed_samples_are_not_valid_and_are_named(loader, shards, caplog, workers):
    damage(shards, {4, 5})
    one = loader(num_workers=workers, max_failed_share=0.5)
    invalid = set()
    for _ in range(10):
        batch = next(one)
        invalid |= {name for name, valid in zip(batch.names, batch.valid.tolist(), strict=True) if not valid}
        assert batch.latents[~batch.valid].eq(0).all() and batch.latents.isfinite().all()
    assert {name.split()[0] for name in invalid} == {"image4.png", "image5.png"}
    assert "image5.png (shard-000001.tar, 000000005): the checksum of its latents is wrong" in caplog.text
    assert one.state_dict()["failed_samples"] >= 2


def test_too_many_failed_samples_stop_the_run(loader, shards):
    damage(shards, {1, 2, 4, 5, 7})
    one = loader(max_failed_share=0.1)
    with pytest.raises(
        DataError, match=r"3 samples could not be read, 15\.00% of the data .*image\d\.png .*checksum"
    ):
        for _ in range(20):
            next(one)


def test_no_failed_sample_at_all_can_be_asked_for(loader, shards):
    damage(shards, {4})
    one = loader(max_failed_share=0.0)
    with pytest.raises(DataError, match="1 samples could not be read"):
        for _ in range(20):
            next(one)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_during_the_run_stops_it(loader, shards, workers):
    one = loader(num_workers=workers)
    next(one)
    for path in shards.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-\d+\.tar is truncated"):
        for _ in range(20):
            next(one)


def test_a_killed_reader_process_stops_the_run(loader):
    one = loader(num_workers=2)
    next(one)
    os.kill(one._readers.processes[1].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="data reader process 1 .* was killed by signal 9"):
        for _ in range(20):
            next(one)


def test_a_missing_data_set_is_named(loader, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        loader(path=tmp_path / "nowhere")


class Sizes:
    in_channels, joint_attention_dim, pooled_projection_dim = 4, 8, 6


@pytest.mark.parametrize("name", ["in_channels", "joint_attention_dim", "pooled_projection_dim"])
def test_shards_for_a_transformer_of_other_sizes_are_refused(loader, name):
    loader(sizes=Sizes())
    other = Sizes()
    setattr(other, name, 16)
    with pytest.raises(DataError, match=rf"{name} \d, this one has 16"):
        loader(sizes=other)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        size = (16, 16) if index % 2 else (12, 20)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red {index}")
    return folder


def test_shards_of_other_encoders_are_refused(loader, images, tmp_path):
    prepare(images, tmp_path / "prepared", BASE)
    loader(path=tmp_path / "prepared", pipeline_dir=str(BASE))
    other = tmp_path / "pipeline"
    shutil.copytree(BASE, other)
    weights = other / "text_encoder_2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for use in (loader, open_shards):
        with pytest.raises(ValueError, match="prepared was encoded by another text_encoder_2 than"):
            use(path=tmp_path / "prepared", pipeline_dir=str(other))
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps({**config, "in_channels": 16}))
    with pytest.raises(DataError, match="in_channels 4, this one has 16"):
        loader(path=tmp_path / "prepared", pipeline_dir=str(other))


@pytest.mark.parametrize("workers", [0, 1])
def test_encoding_while_training_gives_the_samples_of_shards(loader, images, tmp_path, workers):
    """Also where an image has several captions: a place in training draws the same of them."""
    names = sorted(path.name for path in images.glob("*.png"))
    rows = [
        {"file_name": n, "text": [f"a red {i}", f"a blue {i}"], "weights": [1, 2]}
        for i, n in enumerate(names)
    ]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(images, tmp_path / "prepared", BASE)
    from_shards = loader(path=tmp_path / "prepared", pipeline_dir=str(BASE))
    online = loader(path=images, pipeline_dir=str(BASE), encode="online", num_workers=workers)
    for _ in range(5):
        a, b = next(from_shards), next(online)
        for name in TENSORS:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=2e-5)
        assert [name.split()[0] for name in a.names] == b.names
    assert from_shards.state_dict() == online.state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_encoding_while_training_reports_damaged_images(loader, images):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "6.jpg")
    (images / "6.txt").write_text("a red 6")
    (images / "6.jpg").write_bytes((images / "6.jpg").read_bytes()[:2000])
    (images / "7.jpg").write_bytes(damaged_pictures()["struct.error"])
    (images / "7.txt").write_text("a red 7")
    one = loader(path=images, pipeline_dir=str(BASE), encode="online", max_failed_share=0.9)
    failed = set()
    for _ in range(8):
        batch = next(one)
        failed |= {name for name, valid in zip(batch.names, batch.valid.tolist(), strict=True) if not valid}
    assert failed == {"6.jpg", "7.jpg"}
    (images / "6.txt").unlink()
    with pytest.raises(DataError, match=r"1 samples .* 6\.jpg: has no caption"):
        loader(path=images, pipeline_dir=str(BASE), encode="online")


def test_encoding_while_training_needs_a_folder_and_a_pipeline(loader, images, tmp_path):
    with pytest.raises(DataError, match="model.pipeline_dir"):
        loader(path=images, encode="online")
    with pytest.raises(DataError, match="not a folder of images"):
        loader(path=tmp_path / "no", pipeline_dir=str(BASE), encode="online")
