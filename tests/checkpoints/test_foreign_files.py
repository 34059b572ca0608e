"""Files of a run folder that hold something else: each fault is named with its file and key, and nothing is guessed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soar_mega.checkpoints.lineage import read_lineage
from soar_mega.checkpoints.recipes import model_settings
from soar_mega.checkpoints.resume import read_description
from soar_mega.checkpoints.run_folder import RunFolder

START = {"time": "2026-01-01T00:00:00Z", "code": "1"}
PARENT = {"path": "runs/a/export/transformer", "sha256": "0", "lineage": None}
LINEAGE = {"parent": PARENT | {"lineage": {"parent": None, "starts": [START]}}, "starts": [START]}
DESCRIPTION = {
    "format": 1, "iteration": 3, "consumed_samples": 24, "skipped_steps": 0, "loader": None,
    "model": {"num_layers": 4}, "kept_weights": ["ema"],
}  # fmt: skip
COMPLETE = {"iteration": 3, "consumed_samples": 24}
READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint.json": lambda folder: read_description(folder),
    "lineage.json": lambda folder: read_lineage(folder / "lineage.json"),
    "complete.json": lambda folder: RunFolder(folder).complete(),
    "run_config.yaml": lambda folder: model_settings(folder / "iter_0000001"),
}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("checkpoint.json", "", "is not valid JSON"),
        ("checkpoint.json", "[" * 9000, "is not valid JSON"),
        ("checkpoint.json", "[]", r"holds \[\] instead of a JSON object"),
        ("checkpoint.json", {}, "format None"),
        ("checkpoint.json", DESCRIPTION | {"iteration": "3"}, "iteration is '3', a whole number"),
        ("checkpoint.json", DESCRIPTION | {"consumed_samples": -1}, "consumed_samples is -1"),
        ("checkpoint.json", DESCRIPTION | {"model": []}, "model is not what"),
        ("checkpoint.json", DESCRIPTION | {"kept_weights": None}, "kept_weights is not what"),
        ("checkpoint.json", DESCRIPTION | {"loader": "epoch 3"}, "loader is not what"),
        ("checkpoint.json", {k: v for k, v in DESCRIPTION.items() if k != "loader"}, "loader is not what"),
        ("lineage.json", "{", "is not valid JSON"),
        ("lineage.json", {"nodes": []}, "starts is not a list"),
        ("lineage.json", LINEAGE | {"starts": []}, "starts is not a list"),
        ("lineage.json", LINEAGE | {"starts": [{"time": 3, "code": "1"}]}, "starts is not a list"),
        ("lineage.json", LINEAGE | {"parent": "runs/a"}, "parent is neither null nor an object with a path"),
        ("lineage.json", LINEAGE | {"parent": PARENT | {"lineage": 3}}, "parent.lineage is neither null"),
        ("lineage.json", LINEAGE | {"parent": PARENT | {"lineage": {}}}, r"parent\.lineage\.starts is not a list"),
        ("complete.json", "done", "is not valid JSON"),
        ("complete.json", {"status": "ok"}, "iteration is None"),
        ("complete.json", COMPLETE | {"consumed_samples": 1.5}, "consumed_samples is 1.5"),
        ("run_config.yaml", "a: [", "not valid YAML"),
        ("run_config.yaml", "- a", "is no recipe of this program"),
        ("run_config.yaml", "model: 3", "is no recipe of this program"),
        ("run_config.yaml", b"model: {dtype: \xff}", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_written_is_named(tmp_path: Path, name: str, content: Any, words: str) -> None:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name}[:, ].*{words}"):
        READERS[name](tmp_path)


def test_what_is_as_it_was_written_is_read(tmp_path: Path) -> None:
    written = {"checkpoint.json": DESCRIPTION, "lineage.json": LINEAGE, "complete.json": COMPLETE}
    for name, content in written.items():
        (tmp_path / name).write_text(json.dumps(content))
        assert READERS[name](tmp_path) == content
    (tmp_path / "run_config.yaml").write_text("model: {dtype: fp32}\n")
    assert READERS["run_config.yaml"](tmp_path) == {"dtype": "fp32"}
