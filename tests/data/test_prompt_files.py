"""Prompts from files: each fault of a file has its own words, and the order is a function of numbers."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.data import prompt_cache
from soar_mega.data.encoder_facts import TextPart
from soar_mega.data.prompt_cache import MARK, PromptCache, cache_name
from soar_mega.data.prompt_files import read_prompts
from soar_mega.data.prompt_order import PromptOrder
from soar_mega.data.prompts import encode_prompts
from soar_mega.data.text_encoder import TextEncoder

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


def test_folders_and_files_of_the_outside_trainers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A text file with a byte order mark, Windows' ends of lines, empty lines and prompts that come again."""
    lines = ["\ufeffa red 3", "  a blue 7 ", "", "a red 3", "   ", "an 8", "a red 3"]
    (tmp_path / "train.txt").write_bytes("\r\n".join(lines).encode())
    with caplog.at_level(logging.WARNING, "soar_mega"):
        found = read_prompts(tmp_path)
    assert found.prompts == ["a red 3", "a blue 7", "an 8"] and found.metadata == [{}, {}, {}]
    assert "2 lines without a prompt, left out (train.txt:3, train.txt:5)" in caplog.text
    assert "2 lines with a prompt again, kept once (train.txt:4, train.txt:7)" in caplog.text
    assert read_prompts(tmp_path / "train.txt").hash() == found.hash()

    rows = [
        {"prompt": "two 3s", "tag": "counting", "include": [{"class": "3", "count": 2}]},
        {"prompt": "an 8"},
        {"prompt": "two 3s", "tag": "colors"},
        {"prompt": "an 8"},
    ]
    (tmp_path / "test_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.clear()
    with caplog.at_level("WARNING"):
        found = read_prompts(tmp_path, "test", repeats=True)
    [warning] = caplog.messages
    assert "1 lines with a prompt again and something else beside it" in warning and "jsonl:3" in warning
    assert found.prompts == ["two 3s", "an 8"] and found.path.name == "test_metadata.jsonl"
    assert found.metadata == [{"tag": "counting", "include": [{"class": "3", "count": 2}]}, {}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"a red 3\nein gr\xfcnes 4\n", r"a\.txt:2 is not UTF-8 \(byte 0xfc at place 6\)"),
        ("a.txt", "a red 3\n".encode("utf-16"), r"a\.txt:1 is not UTF-8"),
        ("a.txt", b"\n  \n", r"a\.txt holds no prompt"),
        ("a.txt", b"", r"a\.txt holds no prompt"),
        ("a.jsonl", b'{"prompt": "a 3"}\n{"prompt": 3}\n', r"a\.jsonl:2 is not a JSON object with 'prompt', a text"),
        ("a.jsonl", b'["a 3"]\n', r"a\.jsonl:1 is not a JSON object with 'prompt', a text"),
        ("a.jsonl", b'\n{"prompt": "a 3"\n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"prompt": "a \\ud800"}\n', r"a\.jsonl:1: prompt is no text"),
        ("a.csv", b"a 3\n", r"a\.csv: name it \.txt .* or \.jsonl"),
        ("b/other.txt", b"a 3\n", r"b holds neither train_metadata\.jsonl nor train\.txt"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_prompts_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(file.parent if file.parent != tmp_path else file)


def test_the_order_of_prompts_is_a_function_of_seed_and_collection() -> None:
    """No prompt twice in a collection or a pass; each pass in another order, by another seed too."""
    order = PromptOrder(seed=7, prompts=11, count=3, path="x")
    collections = [order.of(n).tolist() for n in range(30)]
    for first in range(0, 30, 3):  # 9 of 11 prompts are a pass
        drawn = [prompt for collection in collections[first : first + 3] for prompt in collection]
        assert len(set(drawn)) == 9 and set(drawn) <= set(range(11))
    assert set(Counter(prompt for c in collections for prompt in c)) == set(range(11))
    assert collections[:3] != collections[3:6]
    assert PromptOrder(7, 11, 3, "x").of(29).tolist() == collections[29]
    assert PromptOrder(8, 11, 3, "x").of(0).tolist() != collections[0]
    with pytest.raises(ValueError, match=r"prompts_per_collection is 12 and x holds 11 different prompts"):
        PromptOrder(7, 11, 12, "x")


def test_prompts_are_encoded_once_and_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several files, of which a killed start had written some; only what is missing is encoded."""
    monkeypatch.setattr(prompt_cache, "PER_FILE", 2)
    prompts = ["a red 3", "two 4s", "an 8", "a 1 above a 2", 'the number "12"']
    name = cache_name(BASE, prompts, torch.float32, None)
    cache = PromptCache(tmp_path, name, len(prompts))
    loads: list[str] = []
    load = TextEncoder.load

    def counted(folder: Path, part: TextPart, *others: Any) -> TextEncoder:
        loads.append(part.part)
        return load(folder, part, *others)

    monkeypatch.setattr(TextEncoder, "load", staticmethod(counted))
    cache.fill(BASE, prompts, torch.float32, None)
    assert sorted(loads) == ["text_encoder", "text_encoder_2", "text_encoder_3"], "once each for three files"
    expected = encode_prompts(BASE, prompts)
    rows = cache.rows(torch.tensor([4, 0, 3]))
    for index, row in ((4, 0), (0, 1), (3, 2)):  # encoded in other company
        torch.testing.assert_close(rows.text[row], expected.conditions.text[index], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows.pooled[row], expected.conditions.pooled[index], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache.empty().text, expected.empty.text, rtol=1e-5, atol=1e-6)

    files = sorted((tmp_path / name).iterdir())
    (tmp_path / "umask").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "umask").stat().st_mode}
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    files[1].unlink()
    with pytest.raises(
        ValueError, match=r"00001\.safetensors is missing: data\.prompt_cache must be a folder"
    ):
        cache.rows(torch.tensor([2]))
    times = [file.stat().st_mtime_ns for file in (files[0], files[2])]
    cache.fill(BASE, prompts, torch.float32, None)
    assert torch.equal(cache.rows(torch.tensor([3])).text[0], rows.text[2])
    assert times == [file.stat().st_mtime_ns for file in (files[0], files[2])]
    monkeypatch.setattr(prompt_cache, "prompt_encoders", None)
    cache.fill(BASE, prompts, torch.float32, None)  # all is there

    files[2].write_bytes(MARK + files[2].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00002\.safetensors cannot be read .* remove it"):
        cache.rows(torch.tensor([4]))


def test_another_set_of_prompts_has_another_name() -> None:
    """Whatever changes an embedding, changes the name."""
    names = [
        cache_name(BASE, ["a 3"], torch.float32, None),
        cache_name(BASE, ["a 4"], torch.float32, None),
        cache_name(BASE, ["a 3"], torch.bfloat16, None),
        cache_name(BASE, ["a 3"], torch.float32, 5),
        cache_name(BASE.with_name("flux_base"), ["a 3"], torch.float32, None),
    ]
    assert len(set(names)) == len(names)
    assert cache_name(BASE, ["a 3"], torch.float32, None) == names[0]
