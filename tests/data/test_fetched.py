"""Sources in any mix, and those that are copied first: urls, commands and parquet."""

import io
import json
import shlex
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from data_fixtures import add_to_tar
from PIL import Image
from test_prepare import BASE, contents

from soar_mega.data import fetched
from soar_mega.data import prepare as prepare_module
from soar_mega.data.fetched import expand
from soar_mega.data.prepare import prepare
from soar_mega.data.prepare_options import Options
from soar_mega.data.shards import open_shards


def pixels(index):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def write_tar(path, *indices):
    with tarfile.open(path, "w") as tar:
        for index in indices:
            for suffix, content in (("png", pixels(index)), ("txt", f"a red {index}".encode())):
                add_to_tar(tar, f"{index}.{suffix}", content)


def write_folder(path, *indices):
    path.mkdir()
    for index in indices:
        (path / f"{index}.png").write_bytes(pixels(index))
        (path / f"{index}.txt").write_text(f"a red {index}")


def test_sources_of_all_kinds_are_one_set(tmp_path, monkeypatch):
    """Tars through a command and a url, a tar in a folder, images, and a list; with no copy left in the end."""
    write_folder(tmp_path / "images", 0)
    write_tar(tmp_path / "images" / "1.tar", 1)
    for index in (2, 3, 4):
        write_tar(tmp_path / f"{index}.tar", index)
    write_folder(tmp_path / "listed", 5)
    (tmp_path / "list.jsonl").write_text(json.dumps({"file_name": "listed/5.png", "text": "a red 5"}))
    command = shlex.join(["cat", str(tmp_path / "4.tar")])
    sources = ["images", "{2..2}.tar", f"file://{tmp_path}/3.tar", f"pipe:{command}", "list.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert prepare(sources, "out", BASE).samples == 6
    write_folder(tmp_path / "all", *range(6))
    prepare("all", "same", BASE)
    mixed, plain = open_shards("out"), open_shards("same")
    for index in range(6):
        for part in ("latents", "text"):
            found, expected = mixed.stored(part, index), plain.stored(part, index)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = [name.split(" (shard")[0] for name in mixed.names(range(6))]
    assert names[:2] == ["images: 0.png", "images: 1.tar/1"] and names[5] == "list.jsonl: listed/5.png"
    assert not (tmp_path / "out" / ".fetched").exists()
    # a finished set is left alone, though the url leads nowhere now
    before = contents(tmp_path / "out")
    (tmp_path / "3.tar").unlink()
    assert prepare(sources, "out", BASE).samples == 6 and contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("pipe:echo half a tar; exit 3", "ended with code 3"),
        ("pipe:(echo half a tar; exit 3) | cat", "ended with code 3"),
        ("s9://bucket/0.tar", "s9://bucket/0.tar cannot be read"),
        ("file:///nowhere/0.tar", "cannot be read"),
        ("nowhere", "there is no source nowhere"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, source, words):
    with pytest.raises(ValueError, match=words):
        prepare(source, tmp_path / "out", BASE)


def test_what_was_copied_is_not_copied_again(tmp_path):
    write_tar(tmp_path / "0.tar", 0)
    command = f"pipe:echo >> {tmp_path}/count; cat {tmp_path}/0.tar"
    with pytest.raises(ValueError, match="exit|ended"):
        prepare([command, "pipe:exit 1"], tmp_path / "out", BASE)
    fetched.fetch(command, fetched.copy_of(command, tmp_path / "out" / ".fetched"))
    assert (tmp_path / "count").read_text() == "\n"


def test_a_source_that_is_given_twice_is_copied_once(tmp_path, monkeypatch):
    """Two processes would write the same file."""
    write_tar(tmp_path / "0.tar", 0, 1)
    url, copied = f"file://{tmp_path}/0.tar", []

    def copy(source, path):
        copied.append(source)
        fetched.fetch(source, path)

    monkeypatch.setattr(prepare_module, "fetch", copy)
    assert prepare([url, url], tmp_path / "out", BASE).samples == 4 and copied == [url]


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train-0.parquet").touch()
    with pytest.raises(ValueError, match=r"train-0\.parquet cannot be read without the package pyarrow"):
        prepare(tmp_path / "set", tmp_path / "out", BASE)


def test_parquet_as_hugging_face_keeps_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "set").mkdir()
    rows = [{"image": {"bytes": pixels(i), "path": None}, "text": f"a red {i}", "score": i} for i in range(3)]
    rows.append({"image": None, "text": "nothing", "score": 9})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "0.parquet")
    result = prepare(tmp_path / "set", tmp_path / "out", BASE, Options(skip_invalid=True))
    assert result.samples == 3 and [reject.kind for reject in result.rejects] == ["picture cannot be read"]
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "set" / "0.parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as parquet"):
        prepare(tmp_path / "broken.parquet", tmp_path / "other", BASE)


def test_braces_are_many_sources(tmp_path):
    assert expand(["s3://b/{08..10}.tar"]) == ["s3://b/08.tar", "s3://b/09.tar", "s3://b/10.tar"]
    shutil.rmtree(tmp_path / "{a,b}", ignore_errors=True)
    (tmp_path / "{a,b}").mkdir()
    assert expand([str(tmp_path / "{a,b}")]) == [str(tmp_path / "{a,b}")]
