"""The page of the RL demo: rewards, held-out scores and drift, against updates and against computation."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from report.page import image, picture, table, whole_page
from report.rl_figures import learning_curves

METHODS = {"flow_grpo": "Flow-GRPO", "diffusion_nft": "DiffusionNFT"}
INTRODUCTION = """
<p class="lead">Two models of equal cost, one made by plain fine-tuning (SFT) and one by SOAR, each go on into two
kinds of reinforcement learning (RL). The reward is 1 where a verifier finds in a picture what its caption asks for.</p>
"""
CURVES = (
    "Left: against optimizer updates. Right: against computation, in forwards of one sample (a backward counts two), "
    "drawing included. Both starts cost equally much and are not counted. Faint: the reward of each collection, "
    "which is what the method trains on. Dotted: the mean of nine of these, four to either side. Held-out rewards are "
    "for captions that no run has seen; drift is measured on held-out pictures, at the guidance that held-out captions "
    "are drawn with."
)
SCORES = """
<p>All models, judged once more on captions that no run has seen, with 95 % intervals by bootstrap over the captions.
The score is the mean over kinds of captions, as GenEval's; the curves are means over captions.
The page <a href="evaluation/report.html">evaluation/report.html</a> compares them pair by pair.</p>
"""
DOUBTS = """
<p>One seed of training, a small model that plain training still improves, and a verifier that rewards what it can read.
What the curves show holds for this run. Drift is close to what SOAR trains on. A method that is drawn from without
guidance learns to do without it: compare it at guidance 1 too.</p>
"""


def write_rl_report(found: Mapping[str, Any], collections: Mapping[str, Sequence[Path]], out: Path) -> None:
    """Writes the page to `out`.

    Args:
        found: "runs" by name with their curves, "judged" (the report.json of `soar-mega evaluate`), and "seconds".
        collections: by run, pictures of its first and its last collection.
    """
    runs = found["runs"]
    parts = ["<h1>SOAR first, then RL</h1>", INTRODUCTION]
    for stage, title in METHODS.items():
        chosen = {name: run for name, run in runs.items() if run["stage"] == stage}
        parts.append(f"<h2>{title}</h2>")
        parts.append(picture(learning_curves(chosen), f"{title}: rewards and drift", CURVES))
        parts += [_pictures(name, run, collections[name]) for name, run in chosen.items()]
    parts += ["<h2>Held-out scores</h2>", SCORES, _scores(found["judged"])]
    parts += ["<h2>What to doubt</h2>", DOUBTS]
    out.write_text(whole_page("SOAR first, then RL", "\n".join(parts)), encoding="utf-8")


def _scores(judged: Mapping[str, Any]) -> str:
    """A row per model, a column per guidance scale: the overall score of the first set."""
    overall = [row for row in judged["scores"] if not row["category"]]
    first = [row for row in overall if (row["set"], row["value"]) == (overall[0]["set"], overall[0]["value"])]
    scales = list(dict.fromkeys(row["guidance_scale"] for row in first))
    cells = {(row["model"], row["guidance_scale"]): row for row in first}
    rows = [
        [escape(model), *(_interval(cells[model, scale]) for scale in scales)]
        for model in dict.fromkeys(row["model"] for row in first)
    ]
    return table(["", *(f"guidance {scale:g}" for scale in scales)], rows)


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['score']:.3f} <small>{row['low']:.2f} to {row['high']:.2f}</small>"


def _pictures(name: str, run: Mapping[str, Any], paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    images = " ".join(image(path.read_bytes(), path.stem, "width: 48%") for path in paths)
    caption = f"{name}, from {run['start']}: best, median and worst samples of the first and of the last collection."
    return f"<figure>{images}<figcaption>{escape(caption)}</figcaption></figure>"
