"""Shards: readable by webdataset, random access, and every kind of damage named."""

import io
import json
import shutil
import zlib

import pytest
import torch
import webdataset
from data_fixtures import make_sample, make_shards
from safetensors.torch import load, save

from soar_mega.data.sample_index import INDEX_FILE
from soar_mega.data.shards import open_shards
from soar_mega.flow import normal


def positions(*values):
    return torch.tensor(values)


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards", [make_sample(i) for i in range(10)])


def edit_json(path, **changes):
    """What a shard's JSON says counts where there is no index of all."""
    (path.parent / INDEX_FILE).unlink(missing_ok=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage(shard_set, part, index):
    """Flip one bit of a part of a sample."""
    offset, size, _ = shard_set._index.place(part, index)
    path = shard_set.path / f"shard-{shard_set._shard_of(index):06d}.tar"
    content = bytearray(path.read_bytes())
    content[offset + size - 1] ^= 1
    path.write_bytes(content)


def test_the_webdataset_library_reads_them(shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(10)]
    assert samples[7]["txt"] == b"caption 7"
    assert json.loads(samples[7]["json"]) == {"name": "image7.png", "bucket": "16x16"}
    latents, text = load(samples[7]["latents.safetensors"]), load(samples[7]["text.safetensors"])
    assert torch.equal(latents["mean"], torch.full((4, 8, 8), 7.0))
    assert torch.equal(text["pooled"], torch.full((6,), 7.0))


def test_random_access_gives_what_was_written(shards):
    read = open_shards(shards).read("16x16", [9, 0, 4], positions(0, 1, 2), seed=0)
    assert read.tensors["latents"][:, 1, 2, 3].tolist() == [9.0, 0.0, 4.0]
    assert read.tensors["text"].shape == (3, 5, 8)
    assert read.tensors["pooled"][:, 0].tolist() == [9.0, 0.0, 4.0]
    assert not read.failures and read.names[0] == "image9.png (shard-000002.tar, 000000009)"


def test_the_last_stage_reads_latents_alone(shards):
    shard_set = open_shards(shards)
    damage(shard_set, "text", 3)
    read = shard_set.read("16x16", [3], positions(0), seed=0, text=False)
    assert set(read.tensors) == {"latents"} and not read.failures


def test_samples_that_lie_otherwise_than_their_neighbours_are_read_too(shards):
    """As another version of a library writes them: with more in the header, and in another order."""
    index = json.loads((shards / "shard-000001.json").read_text())
    offset = index["samples"][1]["text"][0]
    text, pooled = torch.full((5, 8), 50.0), torch.full((6,), 51.0)
    content = save({"a": text, "pooled": pooled}, {"by": "others"}).replace(b'"a"', b'"text"')
    content = (int.from_bytes(content[:8], "little") + 3).to_bytes(8, "little") + content[8:]
    with open(shards / "shard-000001.tar", "r+b") as file:
        file.seek(offset)
        file.write(content)
    index["samples"][1]["text"] = [offset, len(content), zlib.crc32(content)]
    edit_json(shards / "shard-000001.json", **index)
    shard_set = open_shards(shards)
    for _ in range(2):
        read = shard_set.read("16x16", [4, 5, 6, 7], positions(0, 1, 2, 3), seed=0)
        assert read.tensors["text"][:, 0, 0].tolist() == [4.0, 50.0, 6.0, 7.0] and not read.failures
        assert read.tensors["pooled"][:, 5].tolist() == [4.0, 51.0, 6.0, 7.0]


def test_latents_are_drawn_anew_at_each_position(tmp_path):
    sample = make_sample(2)
    sample.latent_std.copy_(torch.rand(4, 8, 8))
    shard_set = open_shards(make_shards(tmp_path / "s", [sample]))
    drawn = shard_set.read("16x16", [0, 0], positions(5, 2**33), seed=9).tensors["latents"]
    for row, position in enumerate([5, 2**33]):
        noise = normal(9, "vae", positions(position), 0, (4, 8, 8))[0]
        torch.testing.assert_close(drawn[row], sample.latent_mean + sample.latent_std * noise, rtol=0, atol=0)
    assert not torch.equal(drawn[0], drawn[1])


def test_a_batch_of_chosen_samples(shards):
    batch = open_shards(shards).batch([8, 2], seed=5)
    assert batch.position.tolist() == [8, 2] and batch.valid.all() and batch.seed == 5
    assert batch.latent_shape == (4, 8, 8) and batch.text_length == 5
    assert batch.latents[:, 0, 0, 0].tolist() == [8.0, 2.0]
    assert batch.empty_text.eq(-1).all() and batch.empty_pooled.shape == (6,)


def test_groups_hold_one_bucket_each(tmp_path):
    sizes = [(16, 16), (12, 20), (16, 16), (16, 16), (12, 20)]
    shard_set = open_shards(
        make_shards(tmp_path / "s", [make_sample(i, size) for i, size in enumerate(sizes)])
    )
    assert shard_set.one_bucket_groups(5, 2) == [[1, 4], [0, 2], [3]]
    assert shard_set.one_bucket_groups(2, 2) == [[0, 2]]  # spread over all
    assert shard_set.batch([1, 4], seed=0).latent_shape == (4, 10, 6)
    with pytest.raises(ValueError, match="samples 0 and 1 are not of one bucket"):
        shard_set.batch([0, 1], seed=0)


def test_bytes_depend_on_the_samples_alone(tmp_path):
    a = make_shards(tmp_path / "a", [make_sample(i) for i in range(5)])
    b = make_shards(tmp_path / "b", [make_sample(i) for i in range(5)])
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


@pytest.mark.parametrize("part", ["latents", "text"])
def test_a_damaged_sample_is_reported_by_name_and_the_others_are_read(shards, part):
    shard_set = open_shards(shards)
    damage(shard_set, part, 5)
    read = shard_set.read("16x16", [4, 5], positions(0, 1), seed=0)
    assert list(read.failures) == [1] and "checksum" in read.failures[1]
    assert read.tensors["latents"][:, 0, 0, 0].tolist() == [4.0, 0.0]
    with pytest.raises(ValueError, match=r"image5\.png \(shard-000001\.tar, 000000005\).*checksum"):
        shard_set.batch([4, 5], seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_a_failure(tmp_path, value):
    samples = [make_sample(i) for i in range(2)]
    samples[1].latent_mean[0, 0, 0] = value
    read = open_shards(make_shards(tmp_path / "s", samples)).read("16x16", [0, 1], positions(0, 1), seed=0)
    assert list(read.failures) == [1] and "NaN" in read.failures[1]


def test_numbers_whose_sum_is_infinite_are_no_failure(tmp_path):
    sample = make_sample(0)
    sample.latent_mean.fill_(3e38)
    shard_set = open_shards(make_shards(tmp_path / "s", [sample]))
    assert not shard_set.read("16x16", [0], positions(0), seed=0).failures


def test_a_sample_of_another_shape_is_a_failure(shards):
    sample = make_sample(1, (20, 12))
    path = make_shards(shards.parent / "other", [make_sample(0), sample])
    index = json.loads((path / "shard-000000.json").read_text())
    index["samples"][1]["bucket"] = "16x16"
    edit_json(path / "shard-000000.json", **index)
    edit_json(path / "dataset.json", buckets={"16x16": 2})
    read = open_shards(path).read("16x16", [1], positions(0), seed=0)
    assert "(4, 6, 10) instead of (4, 8, 8)" in read.failures[0]


def test_a_truncated_shard_is_named(shards):
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar has 3000 bytes, not \d+"):
        open_shards(shards)


def test_a_shard_that_is_cut_while_in_use_is_named(shards):
    shard_set = open_shards(shards)
    (shards / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-000001\.tar is truncated"):
        shard_set.read("16x16", [5], positions(0), seed=0)


def test_a_shard_that_vanishes_while_in_use_is_named(shards):
    shard_set = open_shards(shards)
    (shards / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"cannot open shard .*shard-000001\.tar"):
        shard_set.read("16x16", [5], positions(0), seed=0)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.json", "empty.safetensors"])
def test_a_missing_file_is_named(shards, name):
    (shards / name).unlink()
    (shards / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=name):
        open_shards(shards).empty_prompt()


def test_an_index_that_is_not_json_is_named(shards):
    (shards / INDEX_FILE).unlink()
    (shards / "shard-000000.json").write_text("{")
    with pytest.raises(ValueError, match=r"shard-000000\.json is not valid JSON"):
        open_shards(shards)


def test_another_format_version_is_refused(shards):
    edit_json(shards / "dataset.json", format_version=99)
    with pytest.raises(ValueError, match=r"dataset\.json has format version 99"):
        open_shards(shards)


def test_an_index_of_another_data_set_is_refused(shards):
    other = make_shards(shards.parent / "other", [make_sample(0)])
    shutil.copy(other / "shard-000000.json", shards)
    (shards / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.json does not belong"):
        open_shards(shards)


def test_unfinished_empty_and_missing_folders_are_told_apart(shards, tmp_path):
    (shards / "dataset.json").unlink()
    (tmp_path / "empty").mkdir()
    for path, word in [
        (shards, "unfinished"),
        (tmp_path / "empty", "holds no shards"),
        (tmp_path / "no", "not exist"),
    ]:
        with pytest.raises(ValueError, match=word):
            open_shards(path)


def test_only_some_shards_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("soar_mega.data.shard_bytes.OPEN_FILES", 2)
    shard_set = open_shards(make_shards(tmp_path / "s", [make_sample(i) for i in range(5)], per_shard=1))
    opened = []
    real = io.FileIO
    monkeypatch.setattr(
        "soar_mega.data.shard_bytes.FileIO", lambda path: opened.append(real(path)) or opened[-1]
    )
    for index in [0, 1, 2, 3, 4, 3, 0]:
        assert shard_set.read("16x16", [index], positions(0), seed=0).tensors["latents"].max() == index
    assert len(opened) == 6
    assert sum(not file.closed for file in opened) == 2


def edit_first_sample(path, **changes):
    samples = json.loads(path.read_text())["samples"]
    edit_json(path, samples=[{**samples[0], **changes}, *samples[1:]])


@pytest.mark.parametrize(
    "changes",
    [
        {"buckets": [1]},
        {"buckets": {"16x16": "ten"}},
        {"buckets": {"wide": 10}},
        {"buckets": {"\u00b2x16": 10}},
        {"buckets": {"1x1": 10}},
        {"text_shape": 5},
        {"text_shape": [5, None]},
        {"text_dtype": "save"},
        {"vae_scale_factor": 0},
        {"pooled_size": 1e30},
        {"encoders": None},
        {"shards": {}},
        {"shards": [3]},
        {"shards": [{"name": "../shard-000000", "samples": 4, "bytes": 1}]},
        {"shards": [{"name": "a" * 300, "samples": 4, "bytes": 1}]},
        {"shards": [{"name": "shard-\0", "samples": 4, "bytes": 1}]},
    ],
)
def test_a_foreign_dataset_file_is_named(shards, changes):
    edit_json(shards / "dataset.json", **changes)
    with pytest.raises(ValueError, match=rf"dataset\.json: ({next(iter(changes))}|16x16 is 'ten')"):
        open_shards(shards)


@pytest.mark.parametrize("name", ["dataset.json", "shard-000000.json"])
@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000, '{"format_version": 1}'])
def test_a_json_file_that_holds_something_else_is_named(shards, name, content):
    (shards / INDEX_FILE).unlink()
    (shards / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        open_shards(shards)


@pytest.mark.parametrize(
    "changes",
    [
        {"latents": [1, 2]},
        {"text": [1, -2, 3]},
        {"latents": [1, "2", 3]},
        {"text": [1, 2, 2**32]},
        {"name": 1},
        {"bucket": None},
    ],
)
def test_a_damaged_index_is_named(shards, changes):
    edit_first_sample(shards / "shard-000000.json", **changes)
    with pytest.raises(ValueError, match=r"shard-000000\.json: its sample 0"):
        open_shards(shards)


@pytest.mark.parametrize("content", [b"", b"x" * 100, save({"text": torch.zeros(5, 8)})])
def test_an_empty_prompt_that_cannot_be_read_is_named(shards, content):
    (shards / "empty.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"empty\.safetensors"):
        open_shards(shards).empty_prompt()


@pytest.mark.parametrize(
    ("part", "content"),
    [("latents", b"no safetensors at all"), ("text", save({"mean": torch.zeros(1)}))],
    ids=["none", "others"],
)
def test_a_sample_that_holds_other_things_is_a_failure(shards, part, content):
    """Its checksum is right: it was written so."""
    offset = json.loads((shards / "shard-000001.json").read_text())["samples"][0][part][0]
    with open(shards / "shard-000001.tar", "r+b") as file:
        file.seek(offset)
        file.write(content)
    edit_first_sample(shards / "shard-000001.json", **{part: [offset, len(content), zlib.crc32(content)]})
    read = open_shards(shards).read("16x16", [4, 7], positions(0, 1), seed=0)
    assert f"its {part}" in read.failures[0] and 1 not in read.failures


def test_a_damaged_empty_prompt_is_refused(shards):
    path = shards / "empty.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"empty\.safetensors was damaged"):
        open_shards(shards).empty_prompt()
