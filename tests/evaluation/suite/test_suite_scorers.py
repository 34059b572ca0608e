"""Published metrics in a suite, with tiny random weights: each image has all values, and failures are told by kind."""

import json
from pathlib import Path

from evaluations import BASE, evaluate, write_suite

from soar_mega.evaluation.scorers.tiny import write_tiny_weights

LINES = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"},
]


def test_the_published_metrics_from_local_weights(tmp_path: Path) -> None:
    scorers = ["clip_score", "aesthetic"]
    for name in ("gen_eval", *scorers):
        write_tiny_weights(name, tmp_path / "weights")
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "test_metadata.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in LINES)
    )
    sets = {
        "geneval": {"prompts": "geneval", "scorers": ["gen_eval"]},
        "drawbench": {"prompts": "numbers.txt", "scorers": scorers},
    }
    published = {"SD3.5-M": {"gen_eval": 0.63, "clip_score": 0.285}}
    suite = write_suite(tmp_path, sets=sets, guidance_scale=[1], steps=[1], published=published)
    words = (f"base={BASE}", "--weights", str(tmp_path / "weights"))
    assert evaluate(suite, tmp_path / "out", *words) == 0
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    own = {(row["set"], row["value"]) for row in said["scores"] if not row["category"]}
    kinds = {("geneval", f"gen_eval/{kind}") for kind in ("missing", "color", "position", "excluded")}
    assert own == kinds | {("geneval", "gen_eval"), ("drawbench", "clip_score"), ("drawbench", "aesthetic")}
    assert {scorer: len(each["weights"]) for scorer, each in said["scorers"].items()} == {
        "gen_eval": 64,
        "clip_score": 64,
        "aesthetic": 64,
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "<td>SD3.5-M (published)</td><td>0.63</td><td>0.285</td><td></td>" in page
        and "gen_eval/missing" in page
    )
