"""A small suite on the built-in pipeline, and what an evaluation leaves in its folder."""

import json
from pathlib import Path

from soar_mega.cli import main

ROOT = Path(__file__).parents[3]
BASE = ROOT / "recipes" / "tiny" / "base"

GENEVAL = [
    {"tag": "colors", "include": [{"class": "3", "count": 1, "color": "red"}], "prompt": "a red 3"},
    {"tag": "counting", "include": [{"class": "2", "count": 3}], "prompt": "three 2s"},
    {"tag": "colors", "include": [{"class": "7", "count": 1, "color": "blue"}], "prompt": "a blue 7"},
    {"tag": "counting", "include": [{"class": "5", "count": 2}], "prompt": "two 5s"},
]
NUMBERS = ['the number "12"', 'the number "345"', 'the number "12"']  # the first one twice: two noises


def write_suite(folder: Path, **changes: object) -> Path:
    """A suite of two sets with 4 and 3 images, of 2 steps each; `changes` are lines of YAML by key."""
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in GENEVAL)
    (folder / "digits" / "test_metadata.jsonl").write_text(lines)
    (folder / "numbers.txt").write_text("\n".join(NUMBERS) + "\n")
    said = {
        "guidance_scale": [3, 1],
        "steps": [2],
        "sets": {
            "digits": {"prompts": "digits", "scorers": ["digits"]},
            "numbers": {"prompts": "numbers.txt", "scorers": ["digits", "jpeg_incompressibility"]},
        },
    } | changes
    path = folder / "suite.yaml"
    path.write_text(json.dumps(said))  # which is YAML too
    return path


def evaluate(suite: Path, out: Path, *words: str) -> int:
    """The command, in this process."""
    return main(["evaluate", *words, "--suite", str(suite), "--out", str(out)])


def kept(out: Path, model: str = "base") -> dict[str, bytes]:
    """Every image and every score of a model."""
    files = [*out.glob(f"images/{model}-*/*/*"), *out.glob(f"scores/{model}-*/*")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}
