"""Job scripts without a cluster: what is rendered, and what until_complete.sh decides, with stand-ins for SLURM."""

import os
import re
import resource
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from soar_mega.cli import main
from soar_mega.launch.slurm import TEMPLATES, Job, Resources, render, resources, submit, time_seconds

ROOT = Path(__file__).parents[2]
DATA = ["data.path=recipes", "data.validation_path=recipes"]  # folders that are there
LAUNCH = ["launch", "slurm", "recipes/tiny/soar.yaml", *DATA]

# Stand-ins: srun does what SRUN says; the others write down how they were called.
FAKES = {
    "srun": '[[ $* == *--overlap* ]] && exit "${NODE:-0}"; eval "$SRUN"',
    "scontrol": (
        'case $1 in requeue) echo "requeue $2" >> calls; kill $PPID ;; hostnames) echo n1 ;; '
        '*) echo " JobState=${STATE:-RUNNING} Restarts=${RESTARTS:-0} " ;; esac'
    ),
    "scancel": 'echo "scancel $*" >> calls; [[ -n ${ON_SIGNAL:-} ]] && touch asked',
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def start(
    tmp_path: Path,
    srun: str,
    retries: int = 0,
    job: str = "7",
    more: Mapping[str, str] = MappingProxyType({}),
    before: str = "",
    seconds: int = 60,
    **environment: str,
) -> tuple[int, str]:
    """One start of a job whose run folder is tmp_path/run; its exit code and what it asked SLURM for."""
    fakes = tmp_path / "fakes"
    fakes.mkdir(exist_ok=True)
    for name, body in {**FAKES, **more}.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    (tmp_path / "calls").write_text("")
    command = f"until_complete run/complete.json {seconds} {retries} x; echo after"
    script = f"source {TEMPLATES}/until_complete.sh\n{before}\n{command}"
    values = {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "SRUN": srun,
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=values | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (tmp_path / "calls").read_text().strip() or done.stdout.splitlines()[-1]


def reason(tmp_path: Path) -> str:
    path = tmp_path / "run" / "failure.txt"
    return path.read_text() if path.exists() else ""


def test_complete_by_the_marker(tmp_path: Path) -> None:
    assert start(tmp_path, "touch run/complete.json") == (0, "after")


def test_unfinished_is_requeued(tmp_path: Path) -> None:
    assert start(tmp_path, "echo 5 > run/latest_checkpointed_iteration.txt")[1] == "requeue 7"
    assert reason(tmp_path) == ""


def test_ranks_find_the_jobs_environment_where_jobs_begin_with_none(tmp_path: Path) -> None:
    """SLURM hands the --export=NONE of a job on to its steps, by this variable."""
    assert start(tmp_path, "[[ ! -v SLURM_EXPORT_ENV ]] || exit 9", SLURM_EXPORT_ENV="NONE")[1] == "requeue 7"


def test_an_array_element_is_requeued_alone(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert start(tmp_path, "true", **array)[1] == "requeue 7_3"


def test_a_failure_ends_the_job_with_its_code(tmp_path: Path) -> None:
    code, told = start(tmp_path, "exit 9")
    assert code == 9 and told.endswith("failed: exit code 9") and "exit code 9" in reason(tmp_path)


def test_an_end_that_comes_before_the_shell_looks_keeps_its_code(tmp_path: Path) -> None:
    slow = 'kill() { sleep 0.3; builtin kill "$@"; }'
    assert start(tmp_path, "exit 9", before=slow)[0] == 9
    completes = (
        "sleep 0.6; kill -USR1 $PPID; until [[ -e asked ]]; do sleep 0.02; done; touch run/complete.json"
    )
    assert start(tmp_path, completes, before=slow, ON_SIGNAL="1") == (0, "scancel --signal=USR1 7")


def test_an_old_marker_does_not_cover_a_failure(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "complete.json").touch()
    assert start(tmp_path, "exit 9")[0] == 9


def test_a_dead_node_is_no_failure_of_the_run(tmp_path: Path) -> None:
    assert start(tmp_path, "exit 9", NODE="1")[1] == "requeue 7"


def test_retries_are_counted_per_job(tmp_path: Path) -> None:
    assert start(tmp_path, "exit 9", retries=2)[1] == "requeue 7"
    assert start(tmp_path, "exit 9", retries=2)[1] == "requeue 7"
    assert start(tmp_path, "exit 9", retries=2)[0] == 9
    assert start(tmp_path, "exit 9", retries=2, job="8")[1] == "requeue 8"


def test_five_starts_without_progress_are_enough(tmp_path: Path) -> None:
    def again(number: int) -> tuple[int, str]:
        count = {"SLURM_RESTART_COUNT": str(number), "RESTARTS": str(number)} if number else {}
        return start(tmp_path, "true", **count)

    assert [again(number)[1] for number in range(4)] == ["requeue 7"] * 4
    assert again(4)[0] == 1 and "5 starts without a new checkpoint" in reason(tmp_path)


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    code, told = start(tmp_path, "true", STATE="CANCELLED")
    assert code == 1 and "the job was cancelled" in told


def test_the_script_of_a_lost_node_leaves_its_successor_alone(tmp_path: Path) -> None:
    code, told = start(tmp_path, "exit 9", RESTARTS="1")
    assert code == 1 and "requeue" not in told and reason(tmp_path) == ""


def test_usr1_is_passed_on_until_the_ranks_end(tmp_path: Path) -> None:
    ranks = "kill -USR1 $PPID; until [[ -e asked ]]; do sleep 0.1; done; echo 5 > run/latest_checkpointed_iteration.txt"
    _, calls = start(tmp_path, ranks, ON_SIGNAL="1")
    assert calls.splitlines() == ["scancel --signal=USR1 7", "requeue 7"]


def test_what_serves_a_job_ends_with_it(tmp_path: Path) -> None:
    """Not before the job has a number, and not while SLURM does not answer."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "complete.json").touch()  # of an earlier worker
    answers = ["echo 8", "echo 9 > run/job_id; echo 9", "exit 1", "echo 10"]
    cases = "".join(f"{number}) {words} ;; " for number, words in enumerate(answers, start=1))
    fakes = {
        "sleep": "exec /bin/sleep 0.1",
        "squeue": f"echo x >> asks; case $(wc -l < asks) in {cases} esac",
    }
    until_asked = "until [[ -s calls ]]; do /bin/sleep 0.1; done"
    told = start(tmp_path, until_asked, more=fakes, before="beside=run/job_id")
    assert told == (0, "scancel --signal=TERM 7") and (tmp_path / "run" / "complete.json").exists()
    assert len((tmp_path / "asks").read_text().split()) == 4


def test_what_serves_a_job_is_requeued_as_often_as_that_takes(tmp_path: Path) -> None:
    """It makes no checkpoint by which it could be seen to get on."""
    for number in range(6):
        count = {"SLURM_RESTART_COUNT": str(number), "RESTARTS": str(number)} if number else {}
        fakes = {"sleep": "exec /bin/sleep 0.1", "squeue": "echo 9"}
        before = "mkdir -p run; echo 9 > run/job_id; beside=run/job_id"
        assert start(tmp_path, "true", more=fakes, before=before, **count)[1] == "requeue 7"


def test_a_controller_that_does_not_answer_for_a_while_is_asked_again(tmp_path: Path) -> None:
    """The first question fails, and the first requeue."""
    fails = (
        "[[ $1 != hostnames ]] && { echo x >> calls_made; (( $(wc -l < calls_made) % 3 == 1 )) && exit 1; }; "
    )
    fakes = {"sleep": "exec /bin/sleep 0.1", "scontrol": fails + FAKES["scontrol"]}
    assert start(tmp_path, "true", more=fakes)[1] == "requeue 7"
    assert len((tmp_path / "calls_made").read_text().split()) == 6 and reason(tmp_path) == ""
    refuses = "[[ $1 == requeue ]] && exit 1; "
    fakes = {"sleep": "true", "scontrol": refuses + FAKES["scontrol"]}
    code, told = start(tmp_path, "true", more=fakes)
    assert code == 1 and told.endswith("SLURM does not requeue it")


def test_a_slow_scancel_does_not_take_the_time_for_the_requeue(tmp_path: Path) -> None:
    hang = {"scancel": "exec /bin/sleep 60", "timeout": 'shift; exec /usr/bin/timeout 0.2 "$@"'}
    ranks = "kill -USR1 $PPID; until [[ -s calls ]]; do /bin/sleep 0.1; done"
    fakes = hang | {"sleep": "exec /bin/sleep 0.5"}
    assert start(tmp_path, ranks, more=fakes, seconds=16)[1].splitlines()[0] == "requeue 7"


def test_the_signal_of_the_time_limit_leaves_alone_what_runs_before_and_after(tmp_path: Path) -> None:
    signals = 'kill -USR1 $$; echo() { [[ $1 != after ]] || kill -USR1 $$; builtin echo "$@"; }'
    assert start(tmp_path, "touch run/complete.json", before=signals) == (0, "after")


@pytest.mark.parametrize(
    "name", ["until_complete.sh", "rank.sh", "environment.sh", "venv.sbatch", "container.sbatch"]
)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", TEMPLATES / name], check=True)


def test_rank(tmp_path: Path) -> None:
    place = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "PATH": os.environ["PATH"]}

    def rank(script: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", TEMPLATES / "rank.sh", "bash", "-c", script]
        return subprocess.run(command, env=place, capture_output=True, text=True)

    assert rank("echo $RANK $LOCAL_RANK $WORLD_SIZE").stdout == "3 1 4\n"
    assert [rank(f"exit {code}").returncode for code in (0, 75, 3)] == [0, 0, 3]
    locked, most, core, files = rank("ulimit -S -l; ulimit -H -l; ulimit -S -c; ulimit -S -n").stdout.split()
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert locked == most and core == "0"
    assert int(files) == (65536 if most_files == resource.RLIM_INFINITY else min(65536, most_files))
    assert rank("kill -USR1 $$; exit 4").returncode == 4, "a rank that does not listen yet survives"


def sourced(words: str, **environment: str) -> str:
    """What words of the shell are after environment.sh."""
    script = f"source {TEMPLATES}/environment.sh; echo {words}"
    environment = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True
    ).stdout.strip()


def test_cores_of_a_gpu_job_are_not_for_computing() -> None:
    assert sourced("$OMP_NUM_THREADS") == "1"
    assert sourced("$OMP_NUM_THREADS", SLURM_CPUS_PER_TASK="6") == "6"
    gpus = {"SLURM_CPUS_PER_TASK": "6", "SLURM_GPUS_PER_NODE": "8"}
    assert sourced("$OMP_NUM_THREADS", **gpus) == "1"
    assert sourced("$OMP_NUM_THREADS", OMP_NUM_THREADS="3", **gpus) == "3"


def test_what_is_compiled_stays_on_the_node() -> None:
    caches = "$TRITON_CACHE_DIR $TORCH_EXTENSIONS_DIR"
    mine = f"soar_mega-{os.getuid()}-7"
    assert sourced(caches, SLURM_JOB_ID="7") == f"/tmp/{mine}/triton /tmp/{mine}/torch_extensions"
    given = {"SLURM_JOB_ID": "7", "SLURM_TMPDIR": "/scratch", "TORCH_EXTENSIONS_DIR": "/built"}
    assert sourced(caches, **given) == f"/scratch/{mine}/triton /built"


def test_offline_is_the_default_and_the_shell_wins() -> None:
    assert sourced("$HF_HUB_OFFLINE $TRANSFORMERS_OFFLINE $NCCL_DEBUG", NCCL_DEBUG="INFO") == "1 1 INFO"


def test_words_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(
        name="a b",
        arguments=["train", "my recipe.yaml", "x.y=[1, '2']"],
        marker=Path("my runs/complete.json"),
    )
    text = render(job, Resources(time="01:00:00", account="team", gpus_per_node=0))
    assert "#SBATCH --job-name=a_b\n" in text and "#SBATCH --account=team\n" in text
    assert "gpus" not in text and "partition" not in text and "{{" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    line = next(line for line in text.splitlines() if line.startswith("arguments="))
    told = subprocess.run(
        ["bash", "-c", line + '; printf "%s\\n" "${arguments[@]}"'], capture_output=True, text=True
    )
    assert told.stdout.splitlines() == job.arguments


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "mine.sbatch"
    template.write_text("#!/bin/bash\nrun {{ARGUMENTS}} {{WORDS}}\n")
    job = Job(name="x", arguments=["train", "r.yaml"], marker=tmp_path / "complete.json")
    with pytest.raises(ValueError, match=r"nothing fills in \{\{WORDS\}\}"):
        render(job, Resources(template=str(template)))
    template.write_text("run {{ARGUMENTS}}\n")
    assert render(job, Resources(template=str(template))) == "run train r.yaml\n"
    with pytest.raises(ValueError, match="no such template"):
        render(job, Resources(template="vnv"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("04:00:00", 14400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-00:00:01", 86401),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": "4h"}, "write it like sbatch"),
        ({"time": "00:05:00", "signal_seconds": 300}, "less than the time limit of 300 s"),
        ({"nodes": 0}, "at least 1"),
        ({"cpus_per_task": 0}, "at least 1"),
        ({"gpus_per_node": -1}, "at least 0"),
        ({"retries": -1}, "at least 0"),
        ({"cpus_per_task": "2"}, "expected int"),
        ({"image": "x.sif"}, "go together"),
        ({"template": "container"}, "go together"),
        ({"nodes": "2"}, "expected int"),
    ],
)
def test_resources_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resources(settings, "here")


def test_dry_run_prints_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--nodes",
        "2",
        "parallel.tensor_model_parallel_size=2",
        "--dry-run",
        f"checkpoint.save={tmp_path}/x",
    ]
    assert main([*LAUNCH, *words]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    assert "#SBATCH --signal=B:USR1@300\n" in text and "#SBATCH --requeue\n" in text
    assert f"tensor_model_parallel_size=2 checkpoint.save={tmp_path}/x" in text
    assert not list(tmp_path.iterdir())


def test_a_rank_gets_the_cores_that_it_keeps_busy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--nodes", "1", "--dry-run", f"checkpoint.save={tmp_path}/x", "data.num_workers=3"]

    def cpus(*more: str) -> str:
        assert main([*LAUNCH, *words, *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "--cpus-per-task" in line]
        return line

    sweep = tmp_path / "sweep.txt"
    sweep.write_text("data.num_workers=5\ndata.num_workers=1\n")
    assert cpus() == "#SBATCH --cpus-per-task=7"
    assert cpus("--sweep", str(sweep)) == "#SBATCH --cpus-per-task=9"
    assert cpus("--cpus-per-task", "8") == "#SBATCH --cpus-per-task=8"
    assert cpus("--cpus-per-task", "2", "--gpus-per-node", "0") == "#SBATCH --cpus-per-task=2"
    assert not caplog.messages
    assert cpus("--cpus-per-task", "2") == "#SBATCH --cpus-per-task=2"
    assert "a rank keeps 7 busy (4, and data.num_workers=3)" in caplog.text


def test_sweep_elements_have_folders_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("optimizer.lr=1e-5 # small\n\noptimizer.lr=2e-5 stage.eta=1\n")
    words = ["--nodes", "1", "--sweep", str(sweep), "--dry-run", "checkpoint.save=runs/s"]
    assert main([*LAUNCH, *words]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in text
    case = "1) arguments+=(optimizer.lr=2e-5 stage.eta=1 checkpoint.save=runs/s/1) marker=runs/s/1/complete.json ;;"
    assert case in text
    sweep.write_text("optimizer.rl=1e-5\n")
    assert main([*LAUNCH, *words]) == 1
    said = capsys.readouterr().err
    assert f"{sweep}: line 1: " in said and "did you mean optimizer.lr" in said
    sweep.write_text("checkpoint.save=runs/mine\n")
    assert main([*LAUNCH, *words]) == 1
    assert f"{sweep}: line 1: checkpoint.save: " in capsys.readouterr().err
    sweep.write_text("train.seed=1\ntrain.seed='2\n")
    assert main([*LAUNCH, *words]) == 1
    assert f"{sweep}: line 2: No closing quotation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tensor_model_parallel_size=3"], "does not divide the 8 process"),
        (["parallel.pipeline_model_parallel_size=8"], "more than the 4 layers of this model"),
        (
            [
                "parallel.pipeline_model_parallel_size=4",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            "largest possible here is 1",
        ),
        (["train.train_itres=3"], "unknown key"),
        (
            ["train.global_batch_size=66", "train.micro_batch_size=1"],
            "the 8 data-parallel replicas: nearest is 64",
        ),
        (["data.path=recipes/no/train"], "data.path: recipes/no/train is not there: "),
        (["data.validation_path=nowhere"], "data.validation_path: nowhere is not there"),
        (["checkpoint.save=recipes/tiny/base/runs"], "lies in model.pipeline_dir"),
        (["--signal-seconds", "20000"], "less than the time limit"),
    ],
)
def test_launch_refuses_before_the_queue(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LAUNCH, "--nodes", "1", "--dry-run", *words]) == 1
    assert message in capsys.readouterr().err


def test_each_run_of_a_sweep_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("data.path=tests\ndata.path=nowhere\n")
    assert main([*LAUNCH, "--nodes", "1", "--dry-run", "--sweep", str(sweep)]) == 1
    assert f"{sweep}: line 2: data.path: nowhere is not there" in capsys.readouterr().err


def test_a_part_that_the_export_would_miss_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("recipes/tiny/base", tmp_path / "base")
    shutil.rmtree(tmp_path / "base/vae")
    words = ["--nodes", "1", "--dry-run", f"model.pipeline_dir={tmp_path}/base"]
    assert main([*LAUNCH, *words]) == 1
    assert "names the part vae" in capsys.readouterr().err
    assert main([*LAUNCH, *words, "checkpoint.export=false"]) == 0


def test_data_that_only_the_nodes_have(caplog: pytest.LogCaptureFixture) -> None:
    """Of a disk that is not mounted here not even the first folder is there."""
    assert main([*LAUNCH, "--nodes", "1", "--dry-run", "data.path=/no-such-disk/train"]) == 0
    assert "data.path: /no-such-disk/train is not on this machine" in caplog.text


def test_a_run_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch ends a value at a space, takes # for a comment, and replaces %j."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my runs/50% #1", 'it\'s (a) "run"', "plain"):
        text = render(Job(name="x", arguments=[], marker=Path(folder, "complete.json")), Resources())
        (line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
        said = line.removeprefix("#SBATCH --output=")
        assert re.fullmatch(r'"(\\.|[^"\\])*"|[^ #"\\]+', said), "only quotes keep a space"
        [value] = shlex.split(said)
        assert (
            value.replace("%%", "\0").replace("%j", "7").replace("\0", "%")
            == f"{tmp_path}/{folder}/slurm/7.log"
        )
    assert line.endswith(f"{tmp_path}/plain/slurm/%j.log"), "no quotes without need"


def test_a_job_script_of_the_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soar_mega.launch.slurm._call", lambda *command: "7")
    job = Job(name="x", arguments=["train", "r.yaml"], marker=tmp_path / "complete.json")
    for _ in range(2):
        assert submit(job, Resources()) == "7"
    script = tmp_path / "slurm/job.sbatch"
    assert script.read_text().startswith(render(job, Resources()))
    script.write_text("mine")
    with pytest.raises(ValueError, match="job.sbatch was not written by this program"):
        submit(job, Resources())
    assert script.read_text() == "mine"


def test_without_slurm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*LAUNCH, "--nodes", "1", f"checkpoint.save={tmp_path}/x"]) == 1
    assert "login node" in capsys.readouterr().err
