"""The shipped templates on a real SLURM of four nodes: every way in which a job ends early ends in a resumed run."""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, missing
from rl_cases import OwnReward
from tiny_runs import make_shards

from soar_mega.cli import main
from soar_mega.launch import slurm

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ITERATIONS = 80  # of the runs of 2 nodes x 2 processes: they outlast the time limit of a minute's resolution
SHORT = 60  # of the others, 2 nodes x 1 process: a killed node is down for SLURM after 50 paced seconds at the latest
AWAY = "--sbatch=--nodelist=n[1-2]"  # from the nodes that fail
PATIENCE = 180  # seconds that nothing takes where a run starts in START_SECONDS
START_SECONDS = 20
slowness = 1.0  # of this machine just now: how much longer than START_SECONDS a start takes

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    installed = subprocess.run([HERE / "install.sh"], capture_output=True, text=True)
    reason = installed.stderr.strip() if installed.returncode else missing()
    if reason:
        pytest.skip(f"no SLURM on this machine: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm."))  # not in a private folder of pytest's: munged refuses it
    environment = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PACED_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{HERE}:{os.environ['PATH']}",
    }
    with pytest.MonkeyPatch.context() as patch, Cluster(folder) as started:
        for name, value in environment.items():
            patch.setenv(name, value)
        started.environment = dict(os.environ)
        patch.chdir(ROOT)
        yield started
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up shards for the tiny model, and room for runs."""
    folder = tmp_path_factory.mktemp("work")
    make_shards(folder / "shards", 32, seed=1)
    return folder


def settings(work: Path, iterations: int) -> list[str]:
    """Overrides of recipes/tiny: as small as it gets."""
    return [
        f"data.path={work / 'shards'}",
        "data.validation_path=",
        "checkpoint.save_interval=5",
        f"train.train_iters={iterations}",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "train.points_per_micro_batch=4",
        "logging.log_interval=1",
        "logging.tensorboard=false",
        "logging.eval_interval=0",
        "logging.drift_interval=0",
        "logging.sample_interval=0",
    ]


class Launched:
    """A run submitted by `soar-mega launch slurm`."""

    def __init__(
        self,
        cluster: Cluster,
        work: Path,
        name: str,
        *options: str,
        iterations: int = SHORT,
        processes_per_node: int = 1,
        paced: bool = True,
    ) -> None:
        self.cluster, self.folder, self.iterations = cluster, work / name, iterations
        size = ["--nodes", "2", "--processes-per-node", str(processes_per_node), "--gpus-per-node", "0"]
        size += ["--cpus-per-task", "1"]  # a node has four
        size += ["--time", "15", *(["--python", str(HERE / "paced")] if paced else [])]
        words = [*settings(work, iterations), f"checkpoint.save={self.folder}", "checkpoint.export=false"]
        # a later option wins
        assert main(["launch", "slurm", "recipes/tiny/soar.yaml", *words, *size, *options]) == 0
        self.job = (self.folder / "slurm" / "job_id").read_text().strip()

    def log(self, element: str = "") -> str:
        """What the job has printed, in all of its starts."""
        path = self.folder / "slurm" / f"{self.job}{element}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def tells(self, pattern: str, count: int = 1, element: str = "") -> None:
        """Waits until the log has this."""
        wait_for(
            lambda: len(re.findall(pattern, self.log(element), re.MULTILINE)) >= count,
            lambda: (
                f"{pattern!r} is not in the log:\n{self.log(element)[-4000:]}\n{self.cluster.call('squeue')}"
            ),
        )

    def losses(self) -> dict[int, tuple[str, str]]:
        """Loss and gradient norm of each iteration, as printed."""
        line = r" iteration +(\d+)/ +\d+ \| .* loss: (\S+) \| grad norm: (\S+) \|"
        return {int(i): (loss, norm) for i, loss, norm in re.findall(line, self.log())}


def wait_for(happened: Callable[[], bool], trouble: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE * max(slowness, 3.0)
    while not happened():
        assert time.monotonic() < deadline, trouble()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def reference(cluster: Cluster, work: Path) -> Launched:
    """An uninterrupted run of 2 nodes x 2 processes; its start tells how much time others need."""
    global slowness
    began = time.monotonic()
    run = Launched(cluster, work, "reference", AWAY, iterations=ITERATIONS, processes_per_node=2, paced=False)
    run.tells(r"^ iteration +1/")
    slowness = max(1.0, (time.monotonic() - began) / START_SECONDS)
    os.environ["PACE_SECONDS"] = str(slowness)
    return run


@pytest.fixture(scope="module")
def short_reference(reference: Launched, cluster: Cluster, work: Path) -> Launched:
    """An uninterrupted run of 2 nodes x 1 process."""
    return Launched(cluster, work, "short", AWAY, paced=False)


@pytest.fixture(scope="module")
def limited(reference: Launched, cluster: Cluster, work: Path) -> Launched:
    """A run that is longer than its time limit; submitted early, for the limit takes its time.

    SLURM signals up to 30 seconds early, so this one has at least 40 seconds on a machine that is not slow.
    """
    lead = math.ceil(50 * slowness)
    time_limit = ("--time", str(math.ceil((lead + 30 + 40 * slowness) / 60)), "--signal-seconds", str(lead))
    options = (AWAY, *time_limit)
    return Launched(cluster, work, "limited", *options, iterations=ITERATIONS, processes_per_node=2)


def resumed_like(run: Launched, reference: Launched) -> None:
    """The run was interrupted, resumed, ended well, and nobody can tell from its losses."""
    run.tells(r"soar-mega job \d+: complete$")
    assert re.search(r"^resumed from .*/iter_\d+$", run.log(), re.MULTILINE), run.log()
    reference.tells(r"soar-mega job \d+: complete$")
    assert len(reference.losses()) == reference.iterations == run.iterations
    for iteration, expected in reference.losses().items():
        found = run.losses()[iteration]
        close = pytest.approx([float(value) for value in expected], rel=1e-5)
        assert [float(value) for value in found] == close, f"iteration {iteration}"


def test_term_of_all_ranks(
    limited: Launched, short_reference: Launched, cluster: Cluster, work: Path
) -> None:
    limited.tells(r"^ iteration +1/")
    run = Launched(cluster, work, "term", AWAY)
    run.tells(r"^ iteration +2/")
    cluster.call("scancel", "--signal=TERM", run.job)
    run.tells("stopped by signal SIGTERM at iteration")
    run.tells("start 2 on")
    resumed_like(run, short_reference)


def test_node_failure(limited: Launched, short_reference: Launched, cluster: Cluster, work: Path) -> None:
    limited.tells(r"^ iteration +1/")
    run = Launched(cluster, work, "node", "--sbatch=--exclude=n1")
    run.tells(r"^saved .*/iter_0000005")
    cluster.kill_node("n3")
    try:
        run.tells(r"start 2 on n\[2,4\]")
        resumed_like(run, short_reference)
    finally:
        cluster.start_node("n3")


def test_time_limit(limited: Launched, reference: Launched) -> None:
    limited.tells("stopped by signal SIGUSR1 at iteration")
    limited.tells("start 2 on")
    resumed_like(limited, reference)


def test_preemption(short_reference: Launched, cluster: Cluster, work: Path) -> None:
    run = Launched(cluster, work, "preempted", AWAY, "--signal-seconds", "150")
    run.tells(r"^ iteration +2/")
    urgent = ("--partition=urgent", "--nodelist=n[1-2]", "--exclusive", "--time=1", "--output=/dev/null")
    cluster.call("sbatch", *urgent, "--wrap=sleep 3")
    run.tells("stopped by signal SIGUSR1 at iteration")
    run.tells("start 2 on")
    resumed_like(run, short_reference)


def test_cancelled_stays_cancelled_and_saved(reference: Launched, cluster: Cluster, work: Path) -> None:
    run = Launched(cluster, work, "cancelled")
    run.tells(r"^ iteration +2/")
    cluster.call("scancel", run.job)
    run.tells("stopped by signal SIGTERM at iteration")
    state = ("scontrol", "show", "job", run.job)
    wait_for(lambda: "JobState=CANCELLED" in cluster.call(*state), lambda: cluster.call(*state))
    assert (run.folder / "latest_checkpointed_iteration.txt").exists()
    wait_for(lambda: slurm.queued(run.folder / "slurm") is None, lambda: cluster.call("squeue"))


def test_sweep_requeues_the_stopped_element_alone(reference: Launched, cluster: Cluster, work: Path) -> None:
    sweep = work / "sweep.txt"
    sweep.write_text("# two runs\ntrain.seed=1\n\ntrain.seed=2 train.train_iters=8\n")
    run = Launched(cluster, work, "sweep", "--nodes", "1", "--sweep", str(sweep))
    for element in ("_0", "_1"):
        run.tells(r"^ iteration +1/", element=element)
    cluster.call("scancel", "--signal=TERM", f"{run.job}_0")
    for element in ("_0", "_1"):
        run.tells(r"^soar-mega job \d+_\d: complete", element=element)
    assert "start 2" in run.log("_0") and "start 2" not in run.log("_1")
    assert (run.folder / "0" / "complete.json").exists() and (run.folder / "1" / "complete.json").exists()


@pytest.mark.slow
def test_the_runs_of_a_laboratory(cluster: Cluster, work: Path) -> None:
    """tools/sweep.py --slurm: an array of the runs that are missing; what is complete is in no further one."""
    shared = [word for word in settings(work, 2) if not word.startswith("train.train_iters")]
    said = {
        "folder": str(work / "laboratory"),
        "overrides": [*shared, "checkpoint.export=false"],
        "seeds": [1],
        "budget": {"steps": 2},
        "measures": {"drift": {"drift": [0.9, 0.65], "guidance_scale": 3}},
        "primary": ["drift"],
        "slurm": {"processes_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1, "time": "00:10:00"},
        "arms": {name: {"recipe": f"recipes/tiny/{name}.yaml"} for name in ("sft", "soar")},
    }
    file = work / "laboratory.yaml"
    file.write_text(yaml.safe_dump(said))

    def write_script() -> str:
        command = [sys.executable, "tools/sweep.py", str(file), "--slurm"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    folder = work / "laboratory" / "runs"
    script = work / "laboratory" / "slurm" / "job.sbatch"
    assert write_script() == f"2 runs: sbatch {script}\n"
    cluster.call("sbatch", str(script))
    markers = [folder / name / "complete.json" for name in ("sft-1", "soar-1")]
    wait_for(
        lambda: all(marker.exists() for marker in markers),
        lambda: cluster.call("squeue") + logs(work),
    )
    assert write_script() == "all runs are complete\n"
    markers[0].unlink()
    assert write_script() == f"1 runs: sbatch {script}\n" and "runs/soar-1" not in script.read_text()


def test_container_and_gpus(reference: Launched, cluster: Cluster, work: Path) -> None:
    size = ("--nodes", "1", "--processes-per-node", "2", "--gpus-per-node", "2")
    run = Launched(
        cluster,
        work,
        "folder #1",  # sbatch reads no further than to a space or a #, unless it is told to
        *size,
        "--template",
        "container",
        "--image",
        "image.sif",
        "train.train_iters=2",
    )
    run.tells(r"^soar-mega job \d+: complete$")
    assert run.log().count("in the container") == 2
    assert "#SBATCH --gpus-per-node=2" in (run.folder / "slurm" / "job.sbatch").read_text()


def chain_file(path: Path, work: Path, links: list[dict[str, object]]) -> Path:
    folder = work / path.stem
    size = {
        "nodes": 2,
        "processes_per_node": 1,
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "time": "00:10:00",
        "signal_seconds": 60,
    }
    content = {"folder": str(folder), "pipeline_dir": "recipes/tiny/base", "slurm": size, "links": links}
    path.write_text(yaml.safe_dump(content))
    return path


def test_chain_of_three(cluster: Cluster, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = settings(work, iterations=3)
    command = ["bash", "-c", "test -e $0/model_index.json && touch $1/done", "{pipeline_dir}", "{folder}"]
    links: list[dict[str, object]] = [
        {"name": "sft", "train": "recipes/tiny/sft.yaml", "overrides": train},
        {"name": "soar", "train": "recipes/tiny/soar.yaml", "overrides": train, "start": "checkpoint"},
        {"name": "rl", "command": command, "product": "done"},
    ]
    file = chain_file(work / "three.yaml", work, links)
    assert main(["chain", str(file), "--slurm"]) == 0
    assert main(["chain", str(file), "--slurm"]) == 1, "it is in the queue already"
    wait_for(
        lambda: (work / "three" / "rl" / "completed.json").exists(),
        lambda: cluster.call("squeue") + logs(work / "three"),
    )
    capsys.readouterr()
    assert main(["chain", str(file), "--status"]) == 0
    assert capsys.readouterr().out == "sft: complete\nsoar: complete\nrl: complete\n"
    assert main(["chain", str(file), "--slurm"]) == 0
    assert capsys.readouterr().out == "all links are complete\n"


def test_a_reward_worker_is_there_as_long_as_its_link(
    cluster: Cluster, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of its own, on another node than the run; a broken one ends the run, and its words say why."""
    reward = OwnReward(work, monkeypatch)
    link = {
        "name": "rl",
        "train": "recipes/tiny/flow_grpo.yaml",
        "overrides": reward.words_of_link(work / "rl_words"),
        "slurm": {"nodes": 1, "processes_per_node": 2},
        "reward_worker": {"serve": [reward.key]},
    }
    file = chain_file(work / "judged.yaml", work, [link])
    folder = work / "judged" / "rl"

    def queue() -> list[str]:
        return [
            line for line in cluster.call("squeue", "--noheader", "--format=%j").split() if "judged" in line
        ]

    assert main(["chain", str(file), "--slurm"]) == 0
    wait_for(lambda: not queue(), lambda: cluster.call("squeue") + logs(work / "judged"))
    assert "exit code 1" in (folder / "reward_worker" / "failure.txt").read_text()
    assert "out of order" in logs(folder)
    assert re.search(r"reward worker file:.*/url: job \d+ on n\d: exit code 1", logs(work / "judged"))

    reward.mend()
    capsys.readouterr()
    assert main(["chain", str(file), "--slurm"]) == 0
    wait_for(
        lambda: (folder / "completed.json").exists() and not queue(),
        lambda: cluster.call("squeue") + logs(work / "judged"),
    )
    assert "reward/red: " in (folder / "train.log").read_text()
    told = logs(folder)
    assert "ready: red" in told and "the job that this one serves has ended" in told
    assert (folder / "reward_worker" / "ended").exists()


def test_broken_link_cancels_the_rest(
    cluster: Cluster, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"product": "done", "command": ["touch", "{folder}/done"]}
    links: list[dict[str, object]] = [
        {"name": "one", "command": ["bash", "-c", "echo out of luck; exit 3"], "product": "done"},
        {"name": "two", **good},
        {"name": "three", **good},
    ]
    file = chain_file(work / "broken.yaml", work, links)
    assert main(["chain", str(file), "--slurm"]) == 0
    wait_for(
        lambda: all(
            slurm.queued(work / "broken" / name / "slurm") is None for name in ("one", "two", "three")
        ),
        lambda: cluster.call("squeue") + logs(work / "broken"),
    )
    capsys.readouterr()
    assert main(["chain", str(file), "--status"]) == 0
    told = capsys.readouterr().out
    assert "out of luck" in told and "exit code 3" in told
    assert "two: not started, because one failed" in told and "three: not started, because one failed" in told
    assert not list(work.glob("broken/t*/done"))


def logs(folder: Path) -> str:
    return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in folder.glob("*/slurm/*.log"))
