"""Several captions of one image: one sample, of which each place in training draws one by its weight."""

import json
import tarfile
from collections import Counter
from io import BytesIO

import pytest
import torch
from data_fixtures import POOLED, TEXT, add_to_tar, make_sample, make_shards
from PIL import Image

from soar_mega.data.captions import Caption, drawn, read_captions
from soar_mega.data.image_sources import list_items
from soar_mega.data.items import Item
from soar_mega.data.shard_writer import EncodedCaption
from soar_mega.data.shards import open_shards


def with_captions(index, *weights):
    """A made sample with a caption for each weight; the texts of caption n are index + n / 10."""

    def made(number, weight):
        value = index + number / 10
        text, pooled = torch.full(TEXT, value), torch.full((POOLED,), value)
        return EncodedCaption(caption=f"{index}.{number}", weight=weight, text=text, pooled=pooled)

    sample = make_sample(index)
    object.__setattr__(sample, "weight", weights[0])
    object.__setattr__(sample, "further", [made(n, w) for n, w in enumerate(weights[1:], start=1)])
    return sample


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "s", [with_captions(0, 1.0), with_captions(1, 1.0, 3.0), make_sample(2)])


def test_a_place_in_training_draws_a_caption_by_its_weight(shards):
    opened = open_shards(shards)
    positions = torch.arange(2000)
    read = opened.read("16x16", [1] * 2000, positions, seed=3)
    texts = read.tensors["text"][:, 0, 0]
    assert Counter(texts.tolist()).keys() == {1.0, torch.tensor(1.1).item()}
    assert (texts > 1.05).float().mean() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(read.tensors["pooled"][:, 0], texts), "of the same caption"
    again = (
        open_shards(shards).read("16x16", [1, 1], torch.tensor([7, 1900]), seed=3).tensors["text"][:, 0, 0]
    )
    assert again.tolist() == texts[[7, 1900]].tolist(), "a function of seed and position"
    alone = opened.read("16x16", [0, 2], torch.tensor([5, 6]), seed=3).tensors["text"][:, 0, 0]
    assert alone.tolist() == [0.0, 2.0]


def test_all_captions_are_known_also_to_webdataset(shards):
    opened = open_shards(shards)
    assert [opened.captions(i) for i in range(3)] == [["caption 0"], ["caption 1", "1.1"], ["caption 2"]]
    assert opened.names([1]) == ["image1.png (shard-000000.tar, 000000001)"]
    (shards / "index.bin").unlink()  # and is made anew of the shards' own
    assert open_shards(shards).captions(1) == ["caption 1", "1.1"]
    with tarfile.open(shards / "shard-000000.tar") as tar:
        assert json.load(tar.extractfile("000000001.json"))["weights"] == [1.0, 3.0]
        names = [name for name in tar.getnames() if name.startswith("000000001.")]
    suffixes = ["latents.safetensors", "text.safetensors", "txt", "json", "1.text.safetensors", "1.txt"]
    assert names == [f"000000001.{suffix}" for suffix in suffixes]


@pytest.mark.parametrize(
    "value", [[], [[1.0, 0, 1, 2]], [[1.0, 0, 1], [1.0, 0, 1]], [[0, 0, 1, 2]] * 2, "two"]
)
def test_captions_without_places_are_a_damaged_index(shards, value):
    path = shards / "shard-000000.json"
    index = json.loads(path.read_text())
    index["samples"][1]["captions"] = value
    path.write_text(json.dumps(index))
    (shards / "index.bin").unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.json: its sample 1 has no name, bucket and places"):
        open_shards(shards)


def test_a_row_gives_one_caption_or_several_with_weights(tmp_path):
    assert read_captions({"text": " a "}, "text") == (Caption("a", 1.0),)
    row = {"text": ["a", "b", "never"], "weights": [1, 2.5, 0]}
    assert read_captions(row, "text") == (Caption("a", 1.0), Caption("b", 2.5))
    for weights in ([1], [1, 2, -1], [0, 0, 0], ["1", 1, 1], [True, 1, 1], [1e300, 1, 1], "1", {"a": 1}):
        with pytest.raises(ValueError, match="3 numbers from 0 on, not all 0"):
            read_captions({**row, "weights": weights}, "text")
    for texts in ([], ["a", ""], ["a", None], 3, [["a"]]):
        with pytest.raises(ValueError, match="no caption"):
            read_captions({"text": texts}, "text")
    item = Item(name="x", image=None, captions=read_captions(row, "text"))
    assert drawn([c.weight for c in item.captions], 0, torch.tensor([1])) in (0, 1)


def test_lists_and_tars_give_several(tmp_path):
    picture = BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    (tmp_path / "a.png").write_bytes(picture.getvalue())
    row = {"file_name": "a.png", "captions": ["one", "two"], "weights": [1, 3]}
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"weights": [1]}) + "\n")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("k.png", picture.getvalue()), ("k.json", json.dumps(row).encode())):
            add_to_tar(tar, name, content)
    expected = (Caption("one", 1.0), Caption("two", 3.0))
    (item,), (reject,) = list_items(tmp_path / "list.jsonl")
    assert item.captions == expected and Item.from_row(json.loads(json.dumps(item.to_row()))) == item
    assert reject.name == "list.jsonl:2" and "a.png: weights is [1]" in reject.reason
    assert list_items(tmp_path / "0.tar")[0][0].captions == expected
