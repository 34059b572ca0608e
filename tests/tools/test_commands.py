"""Running commands side by side."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from walk.commands import Command, places_on_gpus, run_together


def python(folder: Path, name: str, code: str) -> Command:
    return Command(name=name, arguments=[sys.executable, "-c", code], log=folder / f"{name}.log", threads=1)


def test_lanes_run_side_by_side_and_their_commands_in_order(tmp_path: Path) -> None:
    wait_for = "import time, pathlib\nwhile not pathlib.Path({!r}).exists(): time.sleep(.05)\n"
    made = [str(tmp_path / name) for name in ("a", "b", "c")]
    make = "open({!r}, 'w')\n"
    # a waits for the other lane's b, and c must not begin before a has ended.
    first = python(tmp_path, "first", wait_for.format(made[1]) + make.format(made[0]))
    second = python(
        tmp_path, "second", f"assert __import__('os').path.exists({made[0]!r})\n" + make.format(made[2])
    )
    other = python(
        tmp_path,
        "other",
        "import os; print('threads', os.environ['OMP_NUM_THREADS'])\n" + make.format(made[1]),
    )
    run_together([first, second], [other])
    assert all(Path(name).exists() for name in made)
    assert (tmp_path / "other.log").read_text().strip() == "threads 1"


def test_a_failure_is_shown_and_stops_the_others(tmp_path: Path) -> None:
    endless = python(tmp_path, "endless", "import time; time.sleep(100)")
    failing = python(tmp_path, "failing", "print('what went wrong'); raise SystemExit(3)")
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"(?s)failing failed with exit code 3:.*what went wrong.*failing\.log"
    ):
        run_together([endless], [failing])
    assert time.monotonic() - started < 30


def test_a_queue_gives_each_process_a_gpu_and_writes_receipts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places_on_gpus(3) == ["0", "1", "0"]
    code = f"""
import os, pathlib, time
here = pathlib.Path({str(tmp_path)!r})
(here / os.environ["CUDA_VISIBLE_DEVICES"]).touch()
while len(list(here.glob("[01]"))) < 2: time.sleep(.05)
"""
    commands = [
        dataclasses.replace(python(tmp_path, name, code), receipt=(tmp_path / f"{name}.txt", "done\n"))
        for name in ("a", "b", "c")
    ]
    assert not commands[0].has_receipt()
    run_together(*([command] for command in commands), at_once=2)
    assert all(command.has_receipt() for command in commands)
    assert not dataclasses.replace(commands[0], receipt=(tmp_path / "a.txt", "otherwise\n")).has_receipt()
    failing = dataclasses.replace(
        python(tmp_path, "d", "raise SystemExit(1)"), receipt=(tmp_path / "d.txt", "")
    )
    with pytest.raises(RuntimeError, match="d failed"):
        run_together([failing])
    assert not failing.has_receipt()


def test_the_state_of_a_training_run_is_its_last_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("walk.commands.PROGRESS_SECONDS", 0.3)
    code = """
import time
for i in (10, 20): print(f' iteration {i:8d}/     300 | loss', flush=True)
time.sleep(3)
"""
    run_together([python(tmp_path, "sft", code)])
    assert "sft at iteration 20 of 300" in capsys.readouterr().out


def test_a_terminated_tool_takes_its_commands_along(tmp_path: Path) -> None:
    tools = Path(__file__).parents[2] / "tools"
    endless = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(100)".format(
        str(tmp_path / "pid")
    )
    code = f"""
import sys; sys.path.insert(0, {str(tools)!r})
from pathlib import Path
from walk.commands import Command, end_on_sigterm, run_together
end_on_sigterm()
log = Path({str(tmp_path / "x.log")!r})
run_together([Command(name="x", arguments=[sys.executable, "-c", {endless!r}], log=log, threads=1)])
"""
    tool = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    tool.terminate()
    assert tool.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
