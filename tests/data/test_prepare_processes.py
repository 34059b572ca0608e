"""prepare by several processes: the same bytes however many there are, and whenever they are killed."""

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from multirank import SERVER
from PIL import Image

from soar_mega.cli.srun import FIRST_PORT, PORTS, adopt_srun
from soar_mega.data.prepare import prepare
from soar_mega.data.prepare_options import Options
from soar_mega.data.processes import Processes
from soar_mega.data.selection import Wishes

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
COUNT, WORLD = 30, 4
PATIENCE = 600  # seconds; on a loaded machine four processes take their time to start


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Captioned images of two shapes, some of which are damaged."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        size = (16, 16) if index % 3 else (12, 20)
        path = folder / f"{index:02d}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a red {index % 10}")
        if index % 10 == 7:
            path.write_bytes(path.read_bytes()[:-40])
    return folder


def run(images, out):
    wishes = Wishes(held_out_share=0.3)
    return prepare(
        images, out, BASE, Options(samples_per_shard=2, skip_invalid=True, wishes=wishes, batch_size=2)
    )


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and ".survey" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(images, folder)
    return contents(folder)


def _process(rank, port, images, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the launcher's, as under torchrun
    run(images, out)


def start(images, out):
    """The store, which lives as long as it is held, and the processes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        SERVER.Process(target=_process, args=(rank, store.port, images, out)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    return store, processes


def finish(started):
    codes = []
    for process in started[1]:
        process.join(PATIENCE)
        codes.append(process.exitcode)
    kill(started)
    assert codes == [0] * WORLD


def kill(started):
    for process in started[1]:
        process.kill()
    for process in started[1]:
        process.join()


def kill_and_go_on(images, out, undisturbed, moments, seed):
    began = time.monotonic()
    finish(start(images, out / "whole"))
    duration = time.monotonic() - began
    assert contents(out / "whole") == undisturbed
    rng = random.Random(seed)
    for moment in range(moments):
        folder = out / f"{moment // 3}"  # killed three times, then let go on
        started = start(images, folder)
        time.sleep(rng.uniform(0, duration))
        kill(started)
        if moment % 3 == 2:
            finish(start(images, folder))
            assert contents(folder) == undisturbed


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(images, undisturbed, tmp_path):
    assert {json.loads(line)["kind"] for line in undisturbed["rejects.jsonl"].splitlines()} == {
        "picture cannot be read"
    }
    assert any(name.startswith("held_out/shard") for name in undisturbed)
    kill_and_go_on(images, tmp_path, undisturbed, 3, seed=0)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(images, undisturbed, tmp_path):
    kill_and_go_on(images, tmp_path, undisturbed, 30, seed=1)


def test_what_one_process_cannot_do_all_of_them_say(images, tmp_path):
    """None waits for the others then."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = SERVER.Queue()
    processes = [SERVER.Process(target=_failing, args=(rank, store.port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    words = sorted(results.get(timeout=PATIENCE) for _ in processes)
    kill((store, processes))
    assert words == ["disk full", "disk full"]


def _failing(rank, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = Processes()

    def fill() -> None:
        if rank == 1:
            raise OSError("disk full")

    try:
        processes.together(fill)
    except (OSError, ValueError) as error:
        results.put(str(error))


def test_a_second_prepare_of_the_same_processes_begins_with_its_first_share():
    """In a script that prepares several sets: nothing would be left to do, and what lay in the folder was taken."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = SERVER.Queue()
    processes = [SERVER.Process(target=_twice, args=(rank, store.port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    shares = [results.get(timeout=PATIENCE) for _ in processes]
    kill((store, processes))
    assert [sorted(mine + others) for mine, others in zip(*shares, strict=True)] == [[0, 1, 2, 3]] * 2


def _twice(rank, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    shares = []
    for _ in range(2):
        processes = Processes()
        shares.append(processes.together(lambda one=processes: list(one.shares("shards", 4))))
        processes.close()
    results.put(shares)


def test_srun_says_what_torchrun_would(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    adopt_srun()
    assert "RANK" not in os.environ
    told = {"STEP_NUM_TASKS": "16", "STEP_NODELIST": "gpu-[07-08,11]", "LOCALID": "5", "JOB_ID": "4020001"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    adopt_srun()
    found = {
        name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "5",
        "MASTER_ADDR": "gpu-07",
        "MASTER_PORT": "20001",
    }
    ways = {"n7": "n7", "a1,b2": "a1", "r[1-2]n[03,05-06]-ib,x[1-3]": "r1n03-ib", "g[4,9]s,h": "g4s"}
    for nodes, first in ways.items():
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("MASTER_ADDR")
        monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
        adopt_srun()
        assert os.environ["MASTER_ADDR"] == first
    assert FIRST_PORT + PORTS <= 32768, "Linux gives the ports above to connections"
