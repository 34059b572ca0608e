"""Chains: what a file means, when a link is done, and what stops the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rl_cases import OwnReward

from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.cli import main
from soar_mega.launch.chain import Chain, load_chain
from soar_mega.launch.links import begin, end, why_not_done
from soar_mega.launch.run_chain import command, job, run_local, status
from soar_mega.launch.run_worker import running
from soar_mega.rewards.client import WorkerScorer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def write(tmp_path: Path, links: Any, **changes: Any) -> Path:
    """A chain file whose own pipeline is a folder that a test may change."""
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True, exist_ok=True)
    (base / "transformer" / "weights").write_text("base")
    path = tmp_path / "chain.yaml"
    content = {"folder": str(tmp_path / "chain"), "pipeline_dir": str(base), "links": links} | changes
    path.write_text(yaml.safe_dump(content))
    return path


def note(name: str, code: int = 0) -> dict[str, Any]:
    """A link that counts how often it runs."""
    script = f"echo x >> $0/ran; touch $0/done; echo {name} says no; exit {code}"
    return {"name": name, "command": ["bash", "-c", script, "{folder}"], "product": "done"}


def ran(tmp_path: Path, name: str) -> int:
    path = tmp_path / "chain" / name / "ran"
    return len(path.read_text().split()) if path.exists() else 0


def train(name: str, *overrides: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "train": "recipes/tiny/soar.yaml", "overrides": list(overrides), **more}


def rl(name: str, *serve: str, **more: Any) -> dict[str, Any]:
    """A link with a reward worker beside it."""
    worker = {"serve": list(serve), **more}
    return {"name": name, "train": "recipes/tiny/flow_grpo.yaml", "reward_worker": worker}


def make_run(chain: Chain, name: str, weights: str = "trained") -> None:
    """What training leaves."""
    link = chain.link(name)
    begin(chain, link)
    (link.folder / "export").mkdir(exist_ok=True)
    (link.folder / "export" / "weights").write_text(weights)
    assert link.recipe is not None
    RunFolder(link.folder).mark_complete(link.recipe.train.train_iters, 1)
    end(link)


def test_shipped_chains() -> None:
    chain = load_chain("recipes/chains/tiny.yaml")
    assert [link.kind for link in chain.links] == ["train", "train", "evaluate", "export", "command"]
    sft, soar, evaluate, export, last = chain.links
    assert [link.parent for link in chain.links] == [None, "sft", "soar", "soar", "export"]
    assert soar.recipe is not None and Path(soar.recipe.model.pipeline_dir).parent == sft.folder
    assert soar.recipe.checkpoint.export_dtype == "fp32", "the next link is to start from nothing rounded"
    assert export.arguments[1:] == [str(soar.folder), str(export.product), "--ema", "--dtype", "fp32"]
    assert last.arguments[3:] == [str(export.product), str(last.folder)]
    assert job(chain, soar).arguments[0] == "train" and soar.resources.nodes == 2
    assert job(chain, soar).num_workers == soar.recipe.data.num_workers
    # a suite is drawn by all ranks of its job
    assert job(chain, evaluate).arguments == evaluate.arguments and evaluate.arguments[0] == "evaluate"
    assert job(chain, evaluate).marker == evaluate.product == evaluate.folder / "report.json"
    assert evaluate.resources.processes == soar.resources.processes > 1
    assert job(chain, export).arguments[-2:] == ["--link", "export"] and export.resources.processes == 1


def test_the_chain_of_a_real_model() -> None:
    chain = load_chain("recipes/chains/sd35_medium.yaml")
    names = ["sft", "soar", "soar_ema", "evaluate", "flow_grpo", "flow_grpo_ema", "evaluate_rl"]
    assert [link.name for link in chain.links] == names
    averaged, rl = chain.link("soar_ema").product, chain.link("flow_grpo").recipe
    assert rl is not None and rl.model.pipeline_dir == str(averaged)
    assert f"soar_ema={averaged}" in chain.link("evaluate").arguments, (
        "what RL starts from is what was judged"
    )
    assert rl.lora.rank > 0 and rl.checkpoint.export_dtype == "fp32"
    assert rl.stage.scorer_weights_dir in chain.link("evaluate").arguments
    assert chain.link("evaluate_rl").parent == "flow_grpo_ema"


def test_a_trainer_of_another_repository_makes_a_pipeline(tmp_path: Path) -> None:
    outside = {"name": "rl", "handoff": ["--to", "flow_grpo", "--run-in", "there", "--checkpoints", 2]}
    chain = load_chain(write(tmp_path, [train("a"), outside, train("b")]))
    a, rl, b = chain.links
    assert rl.arguments == [
        *("handoff", str(a.product), "--save", str(rl.folder)),
        *("--to", "flow_grpo", "--run-in", "there", "--checkpoints", "2"),
    ]
    assert command(rl, 1)[1:4] == ["-m", "soar_mega", "handoff"]
    assert b.recipe is not None and b.recipe.model.pipeline_dir == str(rl.folder / "pipeline")


def test_an_option_may_be_written_with_its_value(tmp_path: Path) -> None:
    """As one word: what a link adds by itself does not go before it."""
    links = [
        train("a"),
        {"name": "e", "export": ["--dtype=bf16"]},
        {"name": "s", "evaluate": ["--suite=tiny"]},
        {"name": "h", "handoff": ["--to=flow_grpo", "--run-in=there"]},
    ]
    chain = load_chain(write(tmp_path, links))
    assert chain.link("e").arguments[3:] == ["--dtype=bf16"]
    assert chain.link("s").product.name == "report.json"
    assert chain.link("h").arguments[-1] == "--run-in=there"


def test_a_link_may_start_from_a_checkpoint_or_the_average(tmp_path: Path) -> None:
    links = [train("a"), train("b", start="checkpoint"), train("c", start="export_ema")]
    chain = load_chain(write(tmp_path, links))
    b, c = chain.link("b").recipe, chain.link("c").recipe
    assert b is not None and c is not None
    assert b.model.pipeline_dir == str(tmp_path / "base")
    assert b.checkpoint.load == str(chain.link("a").folder) and b.checkpoint.finetune
    assert c.model.pipeline_dir == str(chain.link("b").folder / "export_ema") and not c.checkpoint.load


def test_a_chain_may_branch(tmp_path: Path) -> None:
    links = [
        train("a"),
        train("b"),
        {"name": "judge", "evaluate": ["--suite", "tiny"]},
        train("c", **{"from": "a"}),
    ]
    chain = load_chain(write(tmp_path, [*links, note("d", code=3) | {"from": "b"}, note("e")]))
    a, c = chain.link("a"), chain.link("c")
    assert c.recipe is not None and c.recipe.model.pipeline_dir == str(a.product)
    assert [link.parent for link in chain.links] == [None, "a", "b", "a", "b", "b"]
    assert [link.after for link in chain.links] == [None, "a", "b", "a", "b", "d"]
    (chain.link("b").folder).mkdir(parents=True)
    (chain.link("b").folder / "failure.txt").write_text("no room\n")
    told = dict(status(chain, lambda link: None))
    assert told["c"] == "not begun", "it does not wait for b"
    assert [told[name] for name in ("judge", "d", "e")] == ["not started, because b failed"] * 3


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([{"name": "a"}], "link 1: needs exactly one of train, evaluate"),
        ([{"name": "a b", "export": []}], "names the folder"),
        ([note("a"), note("a")], "a word of its own"),
        ([note("..")], "names the folder"),
        ([note("a") | {"command": []}], "a: command: name the program"),
        ([train("a", "train.train_itres=3")], "a: command line: unknown key 'train.train_itres'"),
        ([train("a", start="ema")], "start: one of export, export_ema, checkpoint"),
        ([train("a", start="checkpoint")], "needs a train link before"),
        ([train("a", "train.ema_decay=0"), train("b", start="export_ema")], "keeps no EMA"),
        ([train("a", "checkpoint.export=false")], "a link is done by its export"),
        ([train("a", "checkpoint.save=x")], "a: overrides: checkpoint.save would go unheard"),
        ([train("a", "model.pipeline_dir=x")], "a: overrides: model.pipeline_dir would go unheard"),
        ([{"name": "e", "export": []}], "needs a train link before"),
        ([{"name": "h", "handoff": ["--to", "unirl"]}], "repository with --run-in"),
        (
            [train("a", "lora.rank=2"), train("b", start="checkpoint")],
            "only one of the two links trains adapters",
        ),
        ([{"name": "c", "command": ["true"]}], "proves nothing"),
        ([note("a") | {"prodct": "x"}], "unknown key 'prodct'"),
        ([note("a"), note("b") | {"from": "c"}], "from: 'c' is no link before this one; those are a"),
        ([note("a") | {"slurm": {"time": 14400}}], "in quotes"),
        ([note("a") | {"slurm": {"node": 2}}], "unknown key 'node'"),
        ([train("a", reward_worker={"serve": ["digits"]})], "stage.name=soar draws no samples"),
        ([rl("a", "jpeg_compressibility")], "serves jpeg_compressibility, which .* it has digits"),
        ([rl("a", "--weights", "x")], "name the rewards first"),
        ([rl("a", "digits", slurm={"node": 2})], "a: reward_worker: slurm: unknown key 'node'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, links: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_chain(write(tmp_path, links))


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ({"name": "x", "handoff": ["--run-in", ".", "--to", "nosuch"]}, "invalid choice: 'nosuch'"),
        ({"name": "x", "evaluate": ["--suite", "tiny", "--dtpye", "bf16"]}, "arguments: --dtpye bf16"),
        ({"name": "x", "export": ["--emma"]}, "arguments: --emma"),
        (rl("x", "digits", "--prot", "3"), "arguments: --prot 3"),
    ],
)
def test_a_word_that_the_verb_of_a_later_link_does_not_know_is_found_first(
    tmp_path: Path, link: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [note("one"), train("two"), link])
    assert main(["chain", str(path), "--dry-run"]) == 1
    told = capsys.readouterr()
    assert said in told.err and f"{path}: x: it would run soar-mega " in told.err and not told.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"links: [", "not valid YAML"),
        (b"folder: \xff", "not UTF-8 text"),
        (b"folder: a\nfolder: b", "the key 'folder' is given twice"),
        (b"folder: 2024-13-45", "not valid YAML"),
        (b"- a", "expected `key: value` lines"),
    ],
)
def test_a_file_that_is_no_chain_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "chain.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/chain\.yaml.*{message}"):
        load_chain(tmp_path / "chain.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("link.json", "", "is not valid JSON"),
        ("link.json", "[]", "instead of a JSON object"),
        ("link.json", '{"parent": null}', "settings is no object"),
        ("link.json", '{"settings": {}}', "parent is no hash"),
        ("completed.json", '{"settings": {}, "parent": null}', "product is no hash"),
    ],
)
def test_a_marker_that_is_none_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    chain = load_chain(write(tmp_path, [note("a")]))
    link = chain.link("a")
    link.folder.mkdir(parents=True)
    (link.folder / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"{link.folder / name}.*{message}.*remove it, and the link is done again"
    ):
        why_not_done(chain, link)


def test_a_failed_link_stops_the_rest_and_says_why(tmp_path: Path) -> None:
    chain = load_chain(write(tmp_path, [note("one"), note("two", code=3), note("three")]))
    with pytest.raises(ValueError, match=r"two failed with exit code 3:\n  two says no\nnot started.*three"):
        run_local(chain, 1)
    assert (ran(tmp_path, "one"), ran(tmp_path, "two"), ran(tmp_path, "three")) == (1, 1, 0)
    told = dict(status(chain, lambda link: None))
    assert told["one"] == "complete" and "two says no" in told["two"]
    assert told["three"] == "not started, because two failed"


def test_a_chain_that_is_told_to_end_tells_what_it_runs_and_waits_for_it(tmp_path: Path) -> None:
    saves = 'trap "sleep 0.3; touch $0/saved; exit 75" TERM; touch $0/runs; while true; do sleep 0.1; done'
    link = {"name": "one", "command": ["bash", "-c", saves, str(tmp_path)], "product": "x"}
    process = subprocess.Popen([sys.executable, "-m", "soar_mega", "chain", str(write(tmp_path, [link]))])
    while not (tmp_path / "runs").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130 and (tmp_path / "saved").exists()


def test_rerunning_skips_what_is_complete_and_verified(tmp_path: Path) -> None:
    path = write(tmp_path, [note("one"), note("two")])
    for _ in range(2):
        assert main(["chain", str(path)]) == 0
    assert (ran(tmp_path, "one"), ran(tmp_path, "two")) == (1, 1)
    (tmp_path / "chain" / "one" / "done").write_text("flipped")
    assert main(["chain", str(path)]) == 0
    assert (ran(tmp_path, "one"), ran(tmp_path, "two")) == (2, 1)


def test_success_without_the_product_is_a_failure(tmp_path: Path) -> None:
    link = {"name": "one", "command": ["true"], "product": "done"}
    chain = load_chain(write(tmp_path, [link]))
    with pytest.raises(ValueError, match="ended without its product"):
        run_local(chain, 1)
    assert why_not_done(chain, chain.links[0]) == "not complete"


def test_a_train_link_is_done_by_its_markers_alone(tmp_path: Path) -> None:
    chain = load_chain(write(tmp_path, [train("a"), train("b")]))
    a, b = chain.links
    with pytest.raises(ValueError, match="b cannot begin, because link a is not done: not begun"):
        begin(chain, b)
    assert begin(chain, a)
    (a.folder / "export").mkdir()
    with pytest.raises(ValueError, match="is not complete"):
        end(a)
    RunFolder(a.folder).mark_complete(1, 1)  # of a shorter run
    with pytest.raises(ValueError, match="is not complete"):
        end(a)
    make_run(chain, "a")
    make_run(chain, "b")
    assert why_not_done(chain, a) is None and not begin(chain, b)


def test_a_damaged_export_is_made_again(tmp_path: Path) -> None:
    chain = load_chain(write(tmp_path, [train("a"), train("b")]))
    make_run(chain, "a")
    make_run(chain, "b")
    a, b = chain.links
    weights = a.product / "weights"
    weights.write_text("trainee")
    assert "vouches for" in str(why_not_done(chain, a))
    with pytest.raises(ValueError, match="link a is not done"):
        begin(chain, b)
    assert begin(chain, a)
    assert RunFolder(a.folder).complete() is None  # so that the run exports again
    make_run(chain, "a")
    assert why_not_done(chain, a) is None and why_not_done(chain, b) is None


def test_nothing_goes_on_from_another_parent_or_with_other_settings(tmp_path: Path) -> None:
    path = write(tmp_path, [train("a"), train("b")])
    chain = load_chain(path)
    make_run(chain, "a")
    begin(chain, chain.link("b"))
    (tmp_path / "base" / "transformer" / "weights").write_text("other")
    with pytest.raises(ValueError, match="a was completed differently: its parent was made anew"):
        why_not_done(chain, chain.link("a"))
    changed = load_chain(write(tmp_path, [train("a", "optimizer.lr=1.0"), train("b")]))
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.0005 and is 1.0. Remove .*/a to do it again"):
        begin(changed, changed.link("a"))
    for how in ("parallel.tensor_model_parallel_size=2", "train.step_timeout_minutes=60"):
        other = load_chain(write(tmp_path, [train("a", how), train("b")]))
        assert why_not_done(other, other.link("a")) is None, f"{how} makes no difference to the weights"


def test_a_link_that_was_changed_after_its_job_was_submitted_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its job would do what the file said then, and its marker would tell what it says now."""
    suite = {"name": "s", "evaluate": ["--suite", "tiny"]}
    chain = load_chain(write(tmp_path, [train("a"), suite]))
    jobs = [job(chain, link) for link in chain.links]
    write(tmp_path, [train("a", "optimizer.lr=1.0"), suite])
    assert main(jobs[0].before) == 1
    why = "a was changed after its job was submitted: optimizer.lr was 0.0005 and is 1.0"
    assert why in capsys.readouterr().err and why in (tmp_path / "chain" / "a" / "failure.txt").read_text()
    assert not (tmp_path / "chain" / "a" / "link.json").exists()
    write(tmp_path, [train("a", "logging.log_interval=7"), suite])  # makes no difference to the weights
    assert main(jobs[0].before) == 0
    make_run(chain, "a")
    assert main(jobs[1].before) == 0
    write(tmp_path, [train("a"), suite | {"evaluate": ["--suite", "digits"]}])
    assert main(jobs[1].before) == 1
    assert "s was changed after its job was submitted: arguments was " in capsys.readouterr().err


def test_the_marker_holds_the_lineage(tmp_path: Path) -> None:
    chain = load_chain(write(tmp_path, [train("a"), train("b")]))
    make_run(chain, "a")
    make_run(chain, "b")
    a, b = (json.loads((link.folder / "completed.json").read_text()) for link in chain.links)
    assert b["parent"] == a["product"] and len(a["product"]) == 64
    assert b["settings"]["train.seed"] == 42 and b["code"].startswith("0.")


def test_dry_run_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [train("a"), note("two")])
    for option in ("--local", "--slurm"):
        assert main(["chain", str(path), option, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "-m soar_mega train recipes/tiny/soar.yaml" in told and "--begin a" in told and "--end a" in told
    assert not (tmp_path / "chain").exists()
    torchrun = command(load_chain(path).links[0], 2)
    assert torchrun[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_an_evaluate_link_takes_drift_alone_or_a_suite(tmp_path: Path) -> None:
    links = [
        train("a"),
        {"name": "b", "evaluate": ["--held-out", "shards", "--drift-steps", 10]},
        {"name": "s", "evaluate": ["--suite", "tiny"]},
    ]
    chain = load_chain(write(tmp_path, links))
    drift, suite = chain.link("b"), chain.link("s")
    assert drift.product == drift.folder / "metrics.json"
    assert "torch.distributed.run" not in command(drift, 2)
    assert "torch.distributed.run" in command(suite, 2) and "--nproc-per-node=2" in command(suite, 2)
    assert suite.arguments[1:3] == [f"start={tmp_path}/base", f"a={chain.link('a').product}"]
    # done again with other weights, the report of before must not stand for the new one
    make_run(chain, "a")
    begin(chain, suite)
    suite.product.write_text("a report")
    end(suite)
    assert why_not_done(chain, suite) is None
    make_run(chain, "a", weights="others")
    assert begin(chain, suite) and not suite.product.exists()


def test_a_reward_worker_is_a_job_beside_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    link = rl("rl", "digits", "--max-images", 8, slurm={"gpus_per_node": 0, "time": "01:00:00"})
    link["overrides"] = ["stage.rewards={digits: 1.0, 'my:own#x': 1.0e-05}", "data.prompts=recipes"]
    link["overrides"] += ["logging.eval_interval=0", "logging.drift_interval=0"]
    path = write(tmp_path, [note("a"), link, note("b")], slurm={"nodes": 2, "time": "09:00:00"})
    chain = load_chain(path)
    _, rl_link, _ = chain.links
    worker, url = rl_link.worker, tmp_path / "chain/rl/reward_worker/url"
    assert worker is not None and rl_link.recipe is not None
    assert rl_link.recipe.stage.rewards == {f"file:{url}#digits": 1.0, "my:own#x": 1e-05}
    assert (worker.resources.nodes, worker.resources.processes_per_node, worker.resources.time) == (
        *(1, 1),
        "01:00:00",
    )
    asked: list[tuple[str, ...]] = []

    def slurm(*command: str) -> str:
        asked.append(command)
        return str(len(asked)) if command[0] == "sbatch" else queue

    queue = ""
    monkeypatch.setattr("soar_mega.launch.slurm._call", slurm)
    old = worker.folder / "failure.txt"
    old.parent.mkdir(parents=True)
    old.write_text("of a worker before")
    assert main(["chain", str(path), "--slurm"]) == 0 and not old.exists()
    jobs = {words[-1]: words[1:-1] for words in asked if words[0] == "sbatch"}
    a, served, rl_job, b = (
        f"{tmp_path}/chain/{name}/slurm/job.sbatch" for name in ("a", "rl/reward_worker", "rl", "b")
    )
    number = {script: (tmp_path / script).with_name("job_id").read_text().strip() for script in jobs}
    assert list(jobs) == [a, served, rl_job, b]
    assert f"--dependency=afterok:{number[a]}" in jobs[served]
    assert f"--dependency=afterok:{number[a]},after:{number[served]}" in jobs[rl_job]
    assert f"--dependency=afterok:{number[rl_job]}" in jobs[b]
    script = Path(served).read_text()
    assert f"beside={rl_link.folder}/slurm/job_id" in script and "beside=" not in Path(rl_job).read_text()
    assert (
        f"(serve-reward digits --port 0 --host 0.0.0.0 --token-file {worker.token_file} --max-images 8 "
        f"--url-file {url})" in script
    )
    assert worker.token_file.stat().st_mode & 0o777 == 0o600
    queue = f"{number[served]} RUNNING"
    assert main(["chain", str(path), "--slurm"]) == 1
    assert "the last reward worker of rl is job" in capsys.readouterr().err


def test_a_reward_worker_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    """It answers a client by its file; once it is gone the next question ends with the reason, not after minutes."""
    chain = load_chain(
        write(
            tmp_path,
            [rl("rl", "jpeg_compressibility") | {"overrides": ["stage.rewards={jpeg_compressibility: 1.0}"]}],
        )
    )
    worker, recipe = chain.links[0].worker, chain.links[0].recipe
    assert worker is not None and recipe is not None
    [place] = recipe.stage.rewards
    with running(worker) as process:
        scorer = WorkerScorer(place)
        assert scorer.score(torch.zeros(1, 3, 16, 16), ["a"], [{}])["jpeg_compressibility"].isfinite().all()
        process.kill()
        while not (worker.folder / "failure.txt").exists():
            time.sleep(0.01)
        with pytest.raises(OSError, match="it ended with exit code -9, see .*worker.log"):
            scorer.score(torch.zeros(1, 3, 16, 16), ["a"], [{}])


@pytest.mark.slow
def test_a_reward_worker_does_not_outlive_a_chain_that_is_killed(tmp_path: Path) -> None:
    link = rl("rl", "jpeg_compressibility") | {"overrides": ["stage.rewards={jpeg_compressibility: 1.0}"]}
    program = (
        "import os; from soar_mega.launch.chain import load_chain; from soar_mega.launch.run_worker import running\n"
        f"with running(load_chain({str(write(tmp_path, [link]))!r}).links[0].worker) as process:\n"
        "    print(process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    process = Path("/proc", told.stdout.strip(), "stat")
    assert told.returncode == -9 and told.stdout.strip()
    until = time.monotonic() + 30
    while process.exists() and " Z " not in process.read_text():  # nobody may wait for its end here
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_chain_with_a_reward_worker_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It judges, and ends with its link; a broken one ends the link by its name, and the chain goes on when mended."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reward = OwnReward(tmp_path, monkeypatch)
    link = rl("rl", reward.key) | {"overrides": reward.words_of_link(tmp_path / "words")}
    path = write(tmp_path, [link], pipeline_dir="recipes/tiny/base")
    assert main(["chain", str(path)]) == 1
    told = (tmp_path / "chain/rl/failure.txt").read_text()
    assert "reward worker: it ended with exit code 1" in told and "out of order" in told
    reward.mend()
    assert main(["chain", str(path)]) == 0
    assert "reward/red: " in (tmp_path / "chain/rl/train.log").read_text()
    assert "ready: red" in (tmp_path / "chain/rl/reward_worker/worker.log").read_text()
    assert not (tmp_path / "chain/rl/reward_worker/url").exists(), "it ended with the link"


@pytest.mark.slow
def test_the_tiny_chain_here(tmp_path: Path) -> None:
    from tiny_runs import make_shards

    settings = yaml.safe_load(Path("recipes/chains/tiny.yaml").read_text())
    shards = make_shards(tmp_path / "shards", 64, seed=1)
    for link in settings["links"][:2]:
        link["overrides"] += [f"data.path={shards}", "data.validation_path=", "train.train_iters=3"]
        link["overrides"] += ["train.global_batch_size=8", "train.micro_batch_size=8"]
    evaluate = settings["links"][2]["evaluate"]
    evaluate[evaluate.index("--held-out") + 1] = str(shards)
    settings["folder"] = str(tmp_path / "chain")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    os.environ["OMP_NUM_THREADS"] = "1"
    assert main(["chain", str(path)]) == 0
    chain = load_chain(path)
    assert [state for _, state in status(chain, lambda link: None)] == ["complete"] * 5
    lineage = json.loads((tmp_path / "chain" / "soar" / "lineage.json").read_text())
    assert lineage["parent"]["path"] == str(tmp_path / "chain" / "sft" / "export" / "transformer")
    assert lineage["parent"]["lineage"]["parent"]["path"] == "recipes/tiny/base/transformer"
    with pytest.raises(ValueError, match="neither: evaluate: name a --suite"):
        load_chain(write(tmp_path, [{"name": "neither", "evaluate": ["--dtype", "bf16"]}]))


def test_what_the_last_link_would_refuse_is_found_first(tmp_path: Path) -> None:
    """Before the first link has run; data that a link before it makes in the chain's folder is not there yet."""
    made = f"data.path={tmp_path}/chain/a/shards"
    held_out = "data.validation_path=recipes"
    for override, words in (
        ("data.path=nowhere", "data.path: nowhere is not there"),
        ("train.global_batch_size=65", "multiple of the 2 data-parallel replicas"),
    ):
        links = [note("a"), train("b", made, held_out, "train.micro_batch_size=1", override)]
        with pytest.raises(ValueError, match=words):
            run_local(load_chain(write(tmp_path, links)), 2)
        assert ran(tmp_path, "a") == 0
    drawing = rl("b", "digits") | {
        "overrides": ["stage.rewards={digits: 1.0}", "data.prompts=recipes", held_out]
    }
    for prompts, words in (
        ("nowhere", "data.validation_prompts: nowhere is not there"),
        (f"{tmp_path}/chain/b/export", "data.validation_prompts"),  # what the run writes
    ):
        link = drawing | {"overrides": [*drawing["overrides"], f"data.validation_prompts={prompts}"]}
        with pytest.raises(ValueError, match=words):
            run_local(load_chain(write(tmp_path, [note("a"), link])), 1)
        assert ran(tmp_path, "a") == 0
    links = [note("a", code=3), train("b", made, held_out)]
    with pytest.raises(ValueError, match="link a failed"):
        run_local(load_chain(write(tmp_path, links)), 2)
