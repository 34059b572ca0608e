"""Shards that are elsewhere: the same samples, copies of them within a limit, and nothing else is ever removed."""

import errno
import fcntl
import http.server
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import threading
import time
import zlib
from functools import partial
from types import SimpleNamespace

import fsspec
import pytest
from data_fixtures import make_sample, make_samples, make_shards
from test_loader import same

from soar_mega.config import DataConfig
from soar_mega.data import open_index, remote, shard_cache
from soar_mega.data.info import DataError
from soar_mega.data.loader import Loader
from soar_mega.data.open_index import checksum_of
from soar_mega.data.shard_cache import LOCK, ShardCache
from soar_mega.data.shards import open_shards

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "there", make_samples(12))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def size(shards, count=1):
    """Of some shards, in gigabytes; they are all alike but for some bytes."""
    return sum(path.stat().st_size for path in sorted(shards.glob("*.tar"))[:count]) / 1e9


def copies(cache):
    return sorted(cache.glob("*/shard-*.tar"))


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def reads_of(path, cache, cache_gb=1.0, indices=range(12)):
    """The samples' means of their text, as they are read in turn."""
    found = open_shards(path, cache_dir=str(cache), cache_gb=cache_gb)
    return [found.stored("text", index)["text"].mean().item() for index in indices]


@pytest.fixture
def served(shards):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = lambda *words: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def elsewhere(request, shards):
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        files.put(str(shards), "/sets/train", recursive=True)
        yield "memory://sets/train"
        files.rm("/sets", recursive=True)
    elif request.param == "http":
        yield f"pipe:curl -sf {request.getfixturevalue('served')}/{{}}"
    else:
        yield f"file://{shards}" if request.param == "file" else f"pipe:cat {shlex.quote(str(shards))}/{{}}"


@pytest.mark.parametrize(
    ("elsewhere", "workers"), [("memory", 0), ("file", 2), ("pipe", 0), ("http", 2)], indirect=["elsewhere"]
)
def test_training_reads_the_same_samples_from_elsewhere(shards, cache, elsewhere, workers):
    def load(path):
        return Loader(DataConfig(path=path, cache_dir=str(cache), num_workers=workers), 42, 4)

    here, there = load(str(shards)), load(elsewhere)
    assert all(same(next(here), next(there)) for _ in range(4))
    wait_for(lambda: len(copies(cache)) == 3)
    resumed = load(elsewhere)
    resumed.load_state_dict(json.loads(json.dumps(there.state_dict())))
    assert all(same(next(here), next(resumed)) for _ in range(6))
    for one in (here, there, resumed):
        one.close()
    assert [path.read_bytes() for path in copies(cache)] == [
        path.read_bytes() for path in sorted(shards.glob("*.tar"))
    ]


def test_what_is_in_the_cache_is_not_read_again(shards, cache):
    url = f"file://{shards}"
    assert reads_of(url, cache) == list(range(12))
    wait_for(lambda: len(copies(cache)) == 3)
    for path in [*shards.glob("*.tar"), shards / "index.bin", shards / "empty.safetensors"]:
        path.unlink()
    assert reads_of(url, cache) == list(range(12))


def test_processes_share_the_copies(shards, cache, tmp_path):
    """Each shard is copied once."""
    log = tmp_path / "log"
    command = f"pipe:echo {{}} >> {log}; sleep .1; cat {shards}/{{}}"
    children = [FORK.Process(target=reads_of, args=(command, cache)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    copied = [name for name in log.read_text().split() if name != "dataset.json"]
    assert sorted(copied) == sorted(
        ["empty.safetensors", "index.bin", *(path.name for path in copies(cache))]
    )


def test_a_kill_amid_a_copy_leaves_nothing_that_is_taken_for_whole(shards, cache, tmp_path):
    is_fast = tmp_path / "fast"
    command = (
        f"pipe:if [ -e {is_fast} ] || [ {{}} != shard-000001.tar ]; then cat {shards}/{{}}; "
        f"else head -c 3000 {shards}/{{}}; exec sleep 5; fi"
    )
    child = FORK.Process(target=reads_of, args=(command, cache))
    child.start()
    wait_for(lambda: any(path.stat().st_size for path in cache.glob("*/shard-000001.tar.part")))
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert [path.name for path in copies(cache)] == ["shard-000000.tar"]
    is_fast.touch()
    assert reads_of(command, cache) == list(range(12))
    assert len(copies(cache)) == 3 and not list(cache.glob("*/*.part"))


def age(paths, seconds):
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


def test_the_least_recently_used_give_way_and_nothing_foreign_does(shards, cache, tmp_path):
    old = make_shards(tmp_path / "old", [make_sample(i) for i in range(100, 112)])
    reads_of(f"pipe:cat {old}/{{}}", cache)
    shutil.copytree(shards, cache / "mine")  # a set of the user's own
    (cache / "notes.tar").write_bytes(b"x" * 100_000)
    (folder,) = {path.parent for path in copies(cache)} - {cache / "mine"}
    (folder / "shard-000009.tar").write_bytes(b"mine")
    age(cache.rglob("*.tar"), 5000)
    age([folder / "shard-000000.tar"], 2000)
    foreign = [
        path for path in cache.rglob("*.tar") if path.parent != folder or path.name == "shard-000009.tar"
    ]
    command = f"pipe:cat {shards}/{{}}"
    reads_of(command, cache, cache_gb=size(shards, 3) + 1.5 * size(old))
    assert {path.name for path in folder.glob("*.tar")} == {"shard-000000.tar", "shard-000009.tar"}
    assert all(path.is_file() for path in foreign) and len(foreign) == 5
    # what is in use does not
    age([folder / "shard-000000.tar"], 0)
    other = make_shards(tmp_path / "other", [make_sample(i) for i in range(200, 208)])
    before, limit = copies(cache), size(shards, 3) + 2.5 * size(old)
    assert reads_of(f"pipe:cat {other}/{{}}", cache, limit, range(8)) == list(range(200, 208))
    assert set(before) < set(copies(cache)) and len(copies(cache)) == len(before) + 1


@pytest.mark.parametrize("kind", ["url", "pipe"])
def test_a_cache_that_is_too_small_is_told_of_and_gone_without(shards, cache, caplog, kind):
    path = f"file://{shards}" if kind == "url" else f"pipe:cat {shards}/{{}}"
    limit = size(shards) * 1.5
    assert reads_of(path, cache, cache_gb=limit, indices=[0, 4, 8, 1, 5, 9]) == [0, 4, 8, 1, 5, 9]
    assert "fit into data.cache_gb: " in caplog.text
    wait_for(lambda: "no further shards into data.cache_dir" in caplog.text)
    assert len(copies(cache)) == 1


def test_a_full_disk_is_told_of_and_gone_without(shards, cache, caplog, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert reads_of(f"pipe:cat {shards}/{{}}", cache) == list(range(12))
    assert caplog.text.count("No space left on device") == 1 and not copies(cache)
    assert not list(cache.glob("*/*.part"))


def test_a_damaged_copy_is_replaced(shards, cache, caplog):
    url = f"file://{shards}"
    reads_of(f"file://{shards}", cache)
    wait_for(lambda: len(copies(cache)) == 3)
    content = bytearray(copies(cache)[1].read_bytes())
    copies(cache)[1].write_bytes(bytes(len(content)))
    assert reads_of(url, cache) == list(range(12))
    assert "shard-000001.tar was damaged in the cache" in caplog.text
    wait_for(lambda: len(copies(cache)) == 3 and copies(cache)[1].read_bytes() == content)


def test_a_damaged_index_is_replaced(shards, cache):
    url = f"file://{shards}"
    reads_of(url, cache)
    [index] = cache.glob("*/index.bin")
    whole = index.read_bytes()
    index.write_bytes(whole[:-1] + b"!")
    assert reads_of(url, cache) == list(range(12)) and index.read_bytes() == whole


def test_an_index_is_read_through_once_and_by_all_processes_at_the_same_time(shards, cache, monkeypatch):
    """Behind a lock they would take turns, and an index may be of many gigabytes."""
    url, seen = f"file://{shards}", []
    reads_of(url, cache)

    def free_and_told(path):
        seen.append(path.name)
        with open(path.parent / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return checksum_of(path)

    for module in (shard_cache, open_index):
        monkeypatch.setattr(module, "checksum_of", free_and_told)
    open_shards(url, cache_dir=str(cache), cache_gb=1.0)
    assert sorted(seen) == ["empty.safetensors", "index.bin"]


def test_the_checksum_of_a_sample_is_taken_once(shards, cache, monkeypatch):
    url, taken = f"file://{shards}", []
    found = open_shards(url, cache_dir=str(cache), cache_gb=1.0)

    def crc32(content):
        taken.append(len(content))
        return zlib.crc32(content)

    monkeypatch.setattr("soar_mega.data.shards.zlib", SimpleNamespace(crc32=crc32))
    for part in ("latents", "text"):
        found.stored(part, 5)
    assert taken == [found._index.place(part, 5)[1] for part in ("latents", "text")]


def test_damage_that_is_elsewhere_too_is_a_failure_of_the_sample(shards, cache):
    (shards / "shard-000001.tar").write_bytes(bytes((shards / "shard-000001.tar").stat().st_size))
    loader = Loader(DataConfig(path=f"file://{shards}", cache_dir=str(cache), max_failed_share=0.01), 42, 4)
    with pytest.raises(DataError, match=r"shard-000001\.tar.*the checksum of its latents is wrong"):
        for _ in range(4):
            next(loader)


def test_a_set_that_has_changed_is_another_one(shards, cache):
    reads_of(f"pipe:cat {shards}/{{}}", cache)
    shutil.rmtree(shards)
    make_shards(shards, [make_sample(i) for i in range(50, 62)])
    assert reads_of(f"pipe:cat {shards}/{{}}", cache) == list(range(50, 62))


def test_a_network_that_fails_for_a_moment_is_tried_again(shards, cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    flaky = f"pipe:if mkdir {tmp_path}/{{}}-seen 2> /dev/null; then exit 7; fi; cat {shards}/{{}}"
    assert reads_of(flaky, cache) == list(range(12))
    assert "it ended with code 7" in caplog.text
    with pytest.raises(ValueError, match=r"shard-000000\.tar cannot be read: .*code 9"):
        reads_of(f"pipe:case {{}} in *.tar) exit 9;; esac; cat {shards}/{{}}", cache)


def test_a_copy_that_gives_way_as_it_is_opened_is_read_from_elsewhere(shards, cache, monkeypatch):
    found = open_shards(f"file://{shards}", cache_dir=str(cache), cache_gb=1.0)
    monkeypatch.setattr(ShardCache, "find", lambda self, name: self.path / name)
    assert found.stored("text", 3)["text"].mean().item() == 3


def test_half_of_an_answer_is_not_taken_for_a_damaged_sample(shards, monkeypatch):
    """A pipe whose first command fails, a connection that breaks off, a server that sends all whatever is asked for."""
    monkeypatch.setattr(remote, "PAUSES", ())
    half = remote.remote_folder(f"pipe:(head -c 20 {shards}/{{}}; exit 3) | cat")
    for end in (None, 30):
        with pytest.raises(ValueError, match="code 3"):
            half.read("dataset.json", 0, end)
    files = fsspec.filesystem("file")
    whole = type(files).cat_file
    for start, end in ((0, 5), (0, None)):
        answer = partial(whole, files, start=start, end=end)
        monkeypatch.setattr(type(files), "cat_file", lambda _, path, *__, answer=answer: answer(path))
        with pytest.raises(ValueError, match=r"\d+ bytes came where 20 were asked for"):
            remote.remote_folder(f"file://{shards}").read("dataset.json", 10, 30)


def test_what_cannot_be_read_from_elsewhere_is_named(shards, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", ())
    with pytest.raises(ValueError, match=r"is not on this machine: name a folder .* data\.cache_dir"):
        open_shards(f"file://{shards}")
    with pytest.raises(ValueError, match=r"nowhere/dataset\.json is not there"):
        reads_of(f"file://{tmp_path}/nowhere", cache)
    with pytest.raises(ValueError, match="names no file: write {} where"):
        reads_of("pipe:cat", cache)
    with pytest.raises(ValueError, match=r"http://.*/dataset\.json cannot be read: .*aiohttp"):
        reads_of("http://127.0.0.1:9/set", cache)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir .*file cannot be written"):
        reads_of(f"file://{shards}", tmp_path / "file")
    (shards / "index.bin").write_bytes(b"of another set")
    with pytest.raises(ValueError, match=r"index\.bin does not belong to its dataset\.json"):
        reads_of(f"file://{shards}", cache)
    for content in (b"<html>", b"\xff", b"[" * 100_000, b"[]"):
        (shards / "dataset.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"there/dataset\.json (is not valid JSON|holds \[\] instead)"):
            remote.read_info(f"file://{shards}")
