"""The index of a shard set: what the shards' own indices say, opened without reading those."""

import json
import zlib

import pytest
from data_fixtures import make_sample, make_shards

from soar_mega.data.sample_index import INDEX_FILE
from soar_mega.data.shards import open_shards


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "s", [make_sample(i, (16, 16) if i % 3 else (12, 20)) for i in range(10)])


def told(folder):
    """All that an opened set says of its samples."""
    one = open_shards(folder)
    members = {bucket: one.members(bucket).tolist() for bucket in one.info.buckets}
    places = [[one._index.place(part, i) for part in ("latents", "text")] for i in range(len(one))]
    return one.names(range(len(one))), [one.bucket_of(i) for i in range(len(one))], members, places


def test_it_says_what_the_shards_say(shards):
    names, buckets, places = [], [], []
    for path in sorted(shards.glob("shard-*.json")):
        for sample in json.loads(path.read_text())["samples"]:
            names.append(f"{sample['name']} ({path.stem}.tar, {sample['key']})")
            buckets.append(sample["bucket"])
            places.append([tuple(sample["latents"]), tuple(sample["text"])])
    members = {bucket: [i for i in range(10) if buckets[i] == bucket] for bucket in ("12x20", "16x16")}
    assert told(shards) == (names, buckets, members, places)


def test_a_set_is_opened_without_its_json(shards):
    before = told(shards)
    for path in shards.glob("shard-*.json"):
        path.unlink()
    assert told(shards) == before


@pytest.mark.parametrize("harm", ["missing", "damaged", "short", "empty", "another's", "never made"])
def test_an_index_that_does_not_fit_is_made_anew_with_the_same_bytes(shards, tmp_path, harm):
    before, path, dataset = told(shards), shards / INDEX_FILE, shards / "dataset.json"
    index, description = path.read_bytes(), dataset.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "damaged":
        path.write_bytes(index[:-1] + b"!")
    elif harm == "short":
        path.write_bytes(index[:-1])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "another's":
        path.write_bytes((make_shards(tmp_path / "o", [make_sample(0)]) / INDEX_FILE).read_bytes())
    else:
        path.unlink()
        values = json.loads(description)
        assert values.pop("index_crc32") == zlib.crc32(index)
        dataset.write_text(json.dumps(values))
    assert told(shards) == before
    assert path.read_bytes() == index and dataset.read_bytes() == description
    assert not list(shards.glob("*.tmp"))


def test_where_it_cannot_be_written_it_is_held_in_memory(shards, caplog):
    before = told(shards)
    (shards / INDEX_FILE).unlink()
    (shards / INDEX_FILE / "in the way").mkdir(parents=True)
    assert told(shards) == before
    assert "index.bin cannot be written" in caplog.text and not list(shards.glob("*.tmp"))


def test_names_may_hold_anything(tmp_path):
    samples = [make_sample(i) for i in range(3)]
    names = ["\u96ea/a\nb.png", "", "\0 \ud800".encode(errors="replace").decode()]
    for sample, name in zip(samples, names, strict=True):
        object.__setattr__(sample, "name", name)
    found = open_shards(make_shards(tmp_path / "s", samples)).names([2, 1, 0])
    assert [name.rpartition(" (")[0] for name in found] == names[::-1]
