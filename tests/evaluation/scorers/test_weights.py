"""The list of files that scorers read, and what the commands say of them."""

import importlib.util
import re
import shutil
import socket
from pathlib import Path

import pytest

from soar_mega.cli import doctor, main
from soar_mega.evaluation.scorers import SCORERS, SET_METRICS, make_scorer
from soar_mega.evaluation.scorers.scorer_files import BERT_VOCABULARY, OPENAI_CLIP, hash_of_files
from soar_mega.evaluation.scorers.tiny import WRITERS

ALL = SCORERS | SET_METRICS


def test_hashes_are_whole_or_beginnings_and_never_made_up() -> None:
    """Those that are not whole are in the file's own name."""
    for file in {file for entry in ALL.values() for file in entry.files}:
        assert len(file.sha256) in (0, 8, 64) and set(file.sha256) <= set("0123456789abcdef")
        assert len(file.sha256) != 8 or file.sha256 in file.name
        assert file.place.count("/") == 1 and ":" not in file.path


def test_tiny_weights_are_the_files_that_each_scorer_reads(tmp_path: Path) -> None:
    assert {name for name, entry in SCORERS.items() if entry.files} == {*WRITERS, "ocr_paddle"}
    for name, write in WRITERS.items():
        write(tmp_path / name)
        assert SCORERS[name].lacks(tmp_path / name) == []


def test_no_scorer_asks_the_network(weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in WRITERS:
        make_scorer(name, weights_dir)


def test_the_hash_is_of_the_content_of_all_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    both = hash_of_files([a, b])
    assert both == hash_of_files([b, a]) and len(both) == 64 and hash_of_files([]) == ""
    b.write_text("3")
    assert hash_of_files([a, b]) != both


def test_fetch_weights_lists_and_looks(
    weights_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch-weights", "--list"]) == 0
    said = capsys.readouterr().out
    for entry in ALL.values():
        assert all(said.count(f"{file.path}\n") == 1 for file in entry.files)
    assert "1,710,540,580 bytes, SHA-256 a2bf730a" in said and "size unknown, SHA-256 unknown" in said
    assert "ocr: its models are inside the Python package rapidocr" in said

    folder = shutil.copytree(weights_dir, tmp_path / "weights")
    # nothing published to compare
    assert main(["fetch-weights", "--list", "hps", "--weights", str(folder)]) == 0
    assert capsys.readouterr().out.count("is there") == 3
    assert main(["fetch-weights", "--list", "image_reward", "--weights", str(folder)]) == 1
    assert "bytes, not 231,508: not the published file" in capsys.readouterr().out
    (folder / BERT_VOCABULARY.path).write_bytes(b"x" * 231508)
    assert main(["fetch-weights", "--list", "image_reward", "--weights", str(folder)]) == 0
    assert main(["fetch-weights", "--list", "image_reward", "--weights", str(folder), "--verify"]) == 1
    (folder / OPENAI_CLIP / "merges.txt").unlink()
    assert main(["fetch-weights", "--list", "clip_score", "--weights", str(folder)]) == 1
    assert "    MISSING\n" in capsys.readouterr().out
    assert main(["fetch-weights", "--list", "clipscore"]) == 1
    assert "no scorer 'clipscore'; there are clip_score" in capsys.readouterr().err


def test_packages_come_from_where_they_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = (Path(__file__).parents[3] / "setup.py").read_text()
    [extra] = re.findall(r'"evaluation": \[(.*?)\]', setup)
    in_extra = re.findall(r'"([\w-]+)', extra)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    needy = {name: entry for name, entry in ALL.items() if entry.packages}
    assert needy.keys() == {"ocr", "ocr_paddle", "fid"}
    for entry in needy.values():
        [line] = entry.lacks(None)
        assert all(f"the package {name}" in line for name in entry.packages)
        is_there = {name.replace("_", "-") in in_extra for name in entry.packages}
        assert is_there == {"soar_mega[evaluation]" in line}
    with pytest.raises(
        ValueError, match="environment of its own: pip install paddleocr==2.* paddlepaddle==2"
    ):
        make_scorer("ocr_paddle", ".")


def test_doctor_says_what_each_scorer_lacks(weights_dir: Path, tmp_path: Path) -> None:
    without = dict(line.split(maxsplit=1) for line in doctor.scorers(""))
    assert without["hps"] == "not usable: lacks weights (--weights DIR looks for them)"
    folder = shutil.copytree(weights_dir, tmp_path / "weights")
    (folder / OPENAI_CLIP / "config.json").write_text("")  # a copy that broke off at once
    said = dict(line.split(maxsplit=1) for line in doctor.scorers(str(folder)))
    assert said["hps"] == said["digits"] == "usable" and said.keys() == {"digits", *ALL}
    assert said["clip_score"] == f"not usable: lacks {folder / OPENAI_CLIP / 'config.json'}"
