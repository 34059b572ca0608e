"""Sweeps: their files, what is left to do, contrasts with their errors, and the results of an evaluation."""

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from sweeping.canvases import prepare
from sweeping.choice import Choice, choice, put_into
from sweeping.contrasts import Chance, Errors, contrast, holm, pooled
from sweeping.outcomes import Evaluated
from sweeping.page import curves_figure, write_markdown, write_page
from sweeping.plan import Canvases, Measure, read_sweep, units_of
from sweeping.results import contrasts_of, prompts_errors, results
from sweeping.runs import chains, job_script, runs_of
from tiny_runs import make_shards

from soar_mega.evaluation.suite.suite_settings import load_suite
from soar_mega.recipe import recipe_to_yaml
from soar_mega.stages import load_recipe

ROOT = Path(__file__).parents[2]
CANVASES = {"canvases": {"prompts": "canvases", "scorers": ["digits"]}}
SMALL = {
    "seeds": [1, 2],
    "budget": {"steps": 20},
    "measures": {
        "best": {"prompts": "canvases", "scorer": "digits", "guidance_scale": "best"},
        "unguided": {"prompts": "canvases", "scorer": "digits", "guidance_scale": 1},
        "drift": {"drift": [0.9, 0.65], "guidance_scale": 3},
    },
    "primary": ["best"],
    "arms": {
        "sft": {"recipe": "recipes/tiny/sft.yaml"},
        "soar": {"recipe": "recipes/tiny/soar.yaml", "references": ["sft"], "budget": {"forward_units": 60}},
    },
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes name their files from there


def sweep_of(folder: Path, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"folder": str(folder / "out")} | SMALL | changes))
    return read_sweep(path)


def test_the_study_and_its_screening_are_sweeps() -> None:
    study, screening = (read_sweep(f"recipes/tiny/{name}.yaml") for name in ("study", "screening"))
    work = {arm.name: arm.iterations * arm.units for arm in study.arms}
    assert study.arm("soar").iterations == study.arm("sft").iterations == 200
    for name in ("sft_long", "mixflow_long", "soar_chosen_long"):
        assert work[name] == pytest.approx(work["soar"], rel=2e-3)  # equal computation
    used = {seed for arm in screening.arms for seed in arm.seeds}
    assert not used & {seed for arm in study.arms for seed in arm.seeds}  # what chose does not prove
    assert screening.arm("soar_g1_g3").units == 10.5
    assert {arm.iterations for arm in screening.arms if "base" in arm.references} == {200, 734}  # the plateau
    large = {arm.name: arm for arm in read_sweep("recipes/sd35_medium/study.yaml").arms}
    assert large["soar"].units == 23 and large["soar_mixed"].units == 22.5 and large["control"].units == 21
    assert large["sft_long"].iterations == round(5000 * 23 / 3)


def test_the_drawing_of_samples_is_a_part_of_the_work() -> None:
    words = [
        "stage.sampling_steps=6",
        "stage.updates_per_sample=2",
        "stage.guidance_scale=3",
        "stage.kl_beta=0",
    ]
    drawn = [*words, "stage.stochastic_steps=all", "stage.num_learned_steps=null"]
    assert units_of(load_recipe("recipes/tiny/flow_grpo.yaml", drawn)) == 3 * 2 * 5 + 2 * 6 / 2
    replayed = [*drawn, "stage.old_log_probabilities=replayed"]
    assert units_of(load_recipe("recipes/tiny/flow_grpo.yaml", replayed)) == 3 * 2 * 5 + 2 * (6 + 5) / 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": {}}, "unknown key 'arm'"),
        ({"arms": {}}, "arms is missing"),
        ({"primary": ["worst"]}, "there is no measure 'worst'"),
        ({"arms": {"sft": {"recipe": "recipes/tiny/sft.yaml", "references": ["sfd"]}}}, "no arm 'sfd'"),
        ({"arms": {"a b": {"recipe": "recipes/tiny/sft.yaml"}}}, "names folders"),
        ({"arms": {"sft": {"recipe": "recipes/tiny/sft.yaml", "budget": {"hours": 3}}}}, "{steps: 200}"),
        ({"arms": {"sft": {"recipe": "recipes/tiny/sft.yaml", "overrides": ["stage.eta=1"]}}}, "stage.eta"),
        ({"measures": {"x": {"prompts": "canvases", "guidance_scale": 1}}}, "measures.x"),
        ({"measures": {"x": {"drift": [0.9, 0.65], "guidance_scale": "best"}}}, "that is a number"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sweep_of(tmp_path, **changes)


def test_what_is_done_is_skipped_and_other_settings_are_refused(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, curve=[4, 6, 40], slurm={"nodes": 1, "gpus_per_node": 0, "time": "00:30:00"})
    runs = {run.name: run for run in runs_of(sweep)}
    assert list(runs) == ["sft-1", "soar-1", "sft-2", "soar-2"]  # 60 forward units each, 20 steps and 5
    run = runs["sft-2"]
    assert {"train.seed=2", "train.train_iters=20", "checkpoint.save_retain_interval=2"} <= set(run.words)
    assert runs["soar-1"].arm.iterations == 5 and runs["soar-1"].curve == [4]
    assert run.models() == [
        f"sft.4#2={run.folder}/iter_0000004",
        f"sft.6#2={run.folder}/iter_0000006",
        f"sft#2={run.folder}/export_ema",
    ]
    assert not run.is_done()
    run.folder.mkdir(parents=True)
    (run.folder / "run_config.yaml").write_text(recipe_to_yaml(load_recipe(run.words[0], run.words[1:])))
    assert not run.is_done()  # begun
    run.marker.write_text("{}")
    assert run.is_done()
    judging = {command.name: command for chain in chains(sweep, list(runs.values())) for command in chain}
    assert (
        " ".join(judging)
        == "sft-1 evaluate-sft-1 soar-1 evaluate-soar-1 evaluate-sft-2 soar-2 evaluate-soar-2"
    )
    path, text = judging["evaluate-sft-2"].receipt
    path.parent.mkdir(parents=True)
    path.write_text(text)
    # what has been evaluated as it would be now is skipped
    assert len(chains(sweep, list(runs.values()))) == 3
    script, missing = job_script(sweep, list(runs.values()))
    assert missing == 3 and "#SBATCH --array=0-2" in script and "runs/sft-2" not in script

    changed = sweep_of(tmp_path, curve=[4, 6, 40], overrides=["optimizer.lr=1e-3"])
    with pytest.raises(ValueError, match=r"sft-2 is a run with other settings than the arm sft"):
        next(each for each in runs_of(changed) if each.name == "sft-2").is_done()
    assert run.marker.is_file()


def test_data_and_prompts_of_another_plan_do_not_mix(tmp_path: Path) -> None:
    """What was judged by other prompts or by a suite that was changed is judged again; shards are not replaced."""
    out, suite = tmp_path / "out", tmp_path / "suite.yaml"
    changes = {"base": "recipes/tiny/base", "evaluate": ["--suite", str(suite)]}
    for name, count in (("train", 6), ("heldout", 4)):
        make_shards(out / "shards" / name, count, seed=1)

    def is_judged(prompts: int, steps: int = 20) -> bool:
        """Whether the base is, as it would be now; from then on it is."""
        suite.write_text(yaml.safe_dump({"steps": steps, "sets": CANVASES}))
        canvases = {"train": 6, "held_out": 4, "prompts_per_category": prompts}
        sweep = sweep_of(tmp_path, canvases=canvases, **changes)
        prepare(out, sweep.base, sweep.canvases, 1)
        left = chains(sweep, [])
        for [command] in left:
            receipt, text = command.receipt
            receipt.parent.mkdir(parents=True, exist_ok=True)
            receipt.write_text(text)
        return not left

    assert not is_judged(2) and is_judged(2)
    assert not is_judged(3) and is_judged(3)
    assert not is_judged(3, steps=10)
    for key, name in (("train", "train"), ("held_out", "heldout")):
        canvases = Canvases(**{"train": 6, "held_out": 4, "prompts_per_category": 2} | {key: 8})
        with pytest.raises(ValueError, match=rf"{name} holds \d canvases, and canvases.{key} is 8"):
            prepare(out, "recipes/tiny/base", canvases, 1)


def test_the_suite_is_read_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("sweeping.runs.load_suite", lambda *asked: read.append("suite") or load_suite(*asked))
    sweep = sweep_of(tmp_path, base="recipes/tiny/base", evaluate=["--suite", "digits"])
    left = chains(sweep, runs_of(sweep))
    asked = {chain[-1].receipt[1].splitlines()[-1] for chain in left}
    assert len(left) == 5 and len(asked) == 1 and read == ["suite"]


def test_chance_is_what_arms_and_seeds_leave() -> None:
    """Two arms with three seeds in common, one of them with two more, one with a single run: by hand."""
    scores = {"a": {1: 1.0, 2: 3.0, 3: 2.0}, "b": {1: 2.0, 2: 3.0, 3: 4.0}, "c": {1: 9.0}}
    chance = pooled(scores)
    differences = [1.0, 0.0, 2.0]  # b - a; their variance is twice that of a run
    variance = sum((d - 1.0) ** 2 for d in differences) / 2
    assert chance.freedom == 2 and chance.deviation == pytest.approx(math.sqrt(variance / 2))
    found = contrast(scores, "b", "a", "score", chance, 0.0, 0.0)
    assert found.value == 1.0 and found.seeds == 3
    # then the interval is that of the paired t test
    reach = 4.302653 * math.sqrt(variance / 3)
    assert (found.low, found.high) == pytest.approx((1 - reach, 1 + reach))
    with_prompts = contrast(scores, "b", "a", "score", chance, 1.0, 0.0)
    assert with_prompts.high - 1 == pytest.approx(4.302653 * math.hypot(math.sqrt(variance / 3), 1.0))
    assert with_prompts.p > found.p == pytest.approx(0.2254033)  # t = sqrt(3), two degrees of freedom
    alone = contrast(scores, "c", "a", "score", Chance(deviation=0.0, freedom=0), 0.1, 0.0)
    assert alone.value == 8.0 and alone.p is alone.low is None
    assert pooled({"a": {1: 1.0}, "b": {1: 2.0}}).freedom == 0


def test_the_chance_of_images_counts_once() -> None:
    assert Errors(seeds=3.0, prompts=4.0, images=0.0).total == 5.0
    assert Errors(seeds=3.0, prompts=4.0, images=3.0).total == 4.0  # training has no chance of its own
    assert Errors(seeds=3.0, prompts=4.0, images=9.0).total == 4.0


@pytest.mark.parametrize("images", [0.0, 0.4])
def test_prompts_and_images_are_told_apart(images: float) -> None:
    """Drift of 4000 samples: a difference of deviation .3 that all seeds have, and chance of each run's own."""
    draw = np.random.default_rng(0)
    size, seeds = 4000, 5
    shared = draw.normal(0, 0.3, size)
    errors = {f"a#{s}": draw.normal(0, images, size) for s in range(seeds)}
    errors |= {f"b#{s}": shared + draw.normal(0, images, size) for s in range(seeds)}

    class Known(Evaluated):
        def __init__(self) -> None:
            pass

        def errors(self, model: str, measure: Measure) -> list[float]:
            return list(errors[model])

    measure = Measure(name="drift", drift=(0.9, 0.65), guidance_scale=3.0)
    pairs = [(f"a#{s}", f"b#{s}") for s in range(seeds)]
    prompts, chance = prompts_errors(Known(), measure, pairs, (3.0, 3.0))
    of_images = math.sqrt(2 * images**2 / seeds / size)
    assert chance == pytest.approx(of_images, rel=0.1, abs=1e-6)
    assert prompts == pytest.approx(math.hypot(0.3 / math.sqrt(size), of_images), rel=0.05)


def test_more_arms_make_the_chance_better_known() -> None:
    one = {"a": {1: 0.0, 2: 0.3}, "b": {1: 0.2, 2: 0.1}}
    assert pooled(one).freedom == 1
    assert pooled(one | {f"x{i}": {1: 0.1 * i, 2: 0.1} for i in range(10)}).freedom == 11


def test_holm_corrects_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([]) == []


def write_evaluation(folder: Path, arms: dict[str, float], halves: int = 2) -> None:
    """Prompts of two categories: at guidance 3 an arm is right on its share of them, at 1 on half as many."""
    rows, models = [], {}
    for (arm, share), seed in itertools.product(arms.items(), (1, 2)):
        if arm == "base" and seed > 1:
            continue
        name = arm if arm == "base" else f"{arm}#{seed}"
        models[name] = {
            "drift": {"scales": {"3": [{"from": 0.9, "to": 0.65, "errors": [share, share + 0.1 * seed]}]}}
        }
        for number, (scale, noise) in itertools.product(range(40), itertools.product((3.0, 1.0), (0, 1))):
            right = number % 20 < 20 * share * (1 if scale == 3 else 0.5) + seed
            rows.append(
                {
                    "model": name,
                    "guidance_scale": scale,
                    "steps": 20,
                    "set": "canvases",
                    "scorer": "digits",
                    "value": "digits",
                    "image": f"{number}_{noise}",
                    "category": "two" if number < 20 else "one",
                    "half": number % halves,
                    "noise": noise,
                    "score": float(right),
                    "prompt": f"prompt {number}",
                    "written_by": "",
                }
            )
    folder.mkdir(parents=True)
    with (folder / "outcomes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "report.json").write_text(json.dumps({"models": models}))


def test_results_and_page_of_an_evaluation(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, base="recipes/tiny/base")
    write_evaluation(tmp_path / "evaluation", {"base": 0.2, "sft": 0.4, "soar": 0.6})
    result = results(sweep, Evaluated([tmp_path / "evaluation"]))
    best, unguided = result["measures"]["best"], result["measures"]["unguided"]
    assert best["guidance_scale"] == {"sft": 3.0, "soar": 3.0}
    # of 20 prompts of a category (10 in the half that is reported) 8 + seed and 12 + seed are right
    assert best["scores"] == {"sft": {1: 0.4, 2: 0.5}, "soar": {1: 0.6, 2: 0.7}}
    assert unguided["scores"]["sft"] == {1: 0.25, 2: 0.3}
    found = {(each["measure"], each["arm"]): each for each in result["contrasts"]}
    soar = found["best", "soar"]
    assert soar["value"] == pytest.approx(0.2) and soar["seeds"] == 2
    assert soar["errors"]["prompts"] > 0.05  # the prompts that make the difference
    assert soar["errors"]["seeds"] == pytest.approx(0.0, abs=1e-9)  # a seed did the same to both
    assert soar["adjusted"] == soar["p"] and found["unguided", "soar"]["adjusted"] is None
    assert found["drift", "soar"]["value"] == pytest.approx(0.2)
    assert result["measures"]["drift"]["scores"]["sft"][2] == pytest.approx(0.5)
    assert best["curves"]["soar"] == [{"iteration": 5, "forward_units": 55, "mean": pytest.approx(0.65)}]
    assert best["base"] == pytest.approx(0.2)
    assert "model.pipeline_dir=recipes/tiny/base" in sweep.arm("sft").overrides  # all runs start from it

    page = write_page(json.loads(json.dumps(result)), Path("small.html")).decode()
    assert "soar - sft" in page and "+0.200" in page and page.count("data:image/png") == 3
    assert b"tools/sweep.py" in curves_figure(result, "best")
    assert "| soar - sft | best | +0.200 |" in write_markdown(result)


def test_arms_are_compared_with_the_base(tmp_path: Path) -> None:
    """It has no chance in training: the variance of a difference is that of the arm's mean alone."""
    arms = {"sft": SMALL["arms"]["sft"], "soar": SMALL["arms"]["soar"] | {"references": ["sft", "base"]}}
    with pytest.raises(ValueError, match="no arm 'base'"):
        sweep_of(tmp_path, arms=arms)
    sweep = sweep_of(tmp_path, arms=arms, base="recipes/tiny/base")
    write_evaluation(tmp_path / "evaluation", {"base": 0.2, "sft": 0.4, "soar": 0.6})
    evaluated = Evaluated([tmp_path / "evaluation"])
    result = results(sweep, evaluated)
    contrasts, best = result["contrasts"], result["measures"]["best"]
    [found] = [each for each in contrasts if (each["measure"], each["reference"]) == ("best", "base")]
    assert found["value"] == pytest.approx(0.65 - 0.2) and found["seeds"] == 2
    scores = {"base": {1: 0.0, 2: 0.0}, "a": {1: 1.0, 2: 3.0}}
    chance = Chance(deviation=1.0, freedom=3)
    assert contrast(scores, "a", "base", "", chance, 0.0, 0.0, trained=1).errors.seeds == pytest.approx(
        0.5**0.5
    )
    compared = contrasts_of(
        sweep, evaluated, sweep.measures[0], best["guidance_scale"], best["scores"], chance
    )
    errors = {each.reference: each.errors.seeds for each in compared}
    assert errors == {"sft": pytest.approx(1.0), "base": pytest.approx(0.5**0.5)}


def screened(best: dict[str, float], units: dict[str, float]) -> dict:
    """Results of a screening with two seeds, whose standard error of a mean is .01."""
    return {
        "measures": {
            "best": {
                "arms": {name: {"mean": mean, "runs": 2} for name, mean in best.items()},
                "chance": {"deviation": 0.01 * 2**0.5, "freedom": 9},
            }
        },
        "arms": [{"name": name, "iterations": 200, "units": units.get(name, 10)} for name in best],
    }


def test_a_screening_chooses_by_its_rule() -> None:
    screening = Path("recipes/tiny/screening.yaml")
    best = {"sft": 0.9, "soar": 0.8, "soar_g1": 0.7, "soar_n1": 0.691, "soar_length": 0.65}
    chosen = choice(screened(best, {"soar_n1": 7}), screening)
    # cheaper, and within an error of the best
    assert (chosen.arm, chosen.control) == ("soar_n1", "control_n1")
    assert chosen.overrides == ["stage.guidance_scale=1", "stage.num_auxiliary_points=1"]
    assert chosen.control_overrides == ["stage.num_auxiliary_points=1"]
    assert choice(screened(best | {"soar_n1": 0.689}, {"soar_n1": 7}), screening).arm == "soar_g1"
    assert choice(screened(best | {"soar_n1": 0.69}, {}), screening).arm == "soar_g1"  # as dear: the better
    with pytest.raises(ValueError, match="soar_"):
        choice(screened({"sft": 0.9, "soar": 0.8}, {}), screening)


def test_a_choice_replaces_the_chosen_arm_alone() -> None:
    text = Path("recipes/tiny/study.yaml").read_text()
    words = ["stage.guidance_scale={1: 0.5, 3: 0.5}", "stage.points=[1, 3]"]
    chosen = Choice(arm="a", control="b", overrides=words, control_overrides=[])
    before, after = yaml.safe_load(text)["arms"], yaml.safe_load(put_into(text, chosen))["arms"]
    assert after["soar_chosen"].pop("overrides") == after["soar_chosen_long"].pop("overrides") == words
    assert after["control_chosen"].pop("overrides") == []
    for name in ("soar_chosen", "soar_chosen_long", "control_chosen"):
        del before[name]["overrides"]
    assert before == after
    assert put_into(put_into(text, chosen), chosen) == put_into(text, chosen)
    with pytest.raises(ValueError, match="0 lists that it calls &chosen"):
        put_into("arms: {}", chosen)


def test_the_scale_is_chosen_on_prompts_that_are_not_reported(tmp_path: Path) -> None:
    """A model that is right without guidance on one half, and with it on the other."""
    write_evaluation(tmp_path / "evaluation", {"sft": 0.4})
    path = tmp_path / "evaluation" / "outcomes.csv"
    rows = list(csv.DictReader(path.open(newline="")))
    for row in rows:
        row["score"] = str(float((row["half"] == "0") == (row["guidance_scale"] == "1.0")))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    sweep = sweep_of(tmp_path, arms={"sft": SMALL["arms"]["sft"]})
    best = results(sweep, Evaluated([tmp_path / "evaluation"]))["measures"]["best"]
    assert best["guidance_scale"] == {"sft": 1.0} and best["scores"]["sft"] == {1: 0.0, 2: 0.0}
    with pytest.raises(ValueError, match=r"soar#1 has no images of canvases"):
        results(sweep_of(tmp_path), Evaluated([tmp_path / "evaluation"]))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the machine has other work
def test_a_sweep_goes_all_the_way_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    said = SMALL | {
        "folder": str(out),
        "base": "recipes/tiny/base",
        "canvases": {"train": 64, "held_out": 48, "prompts_per_category": 2},
        "overrides": [f"logging.{key}_interval=0" for key in ("eval", "drift", "sample")],
        "seeds": [1],
        "budget": {"steps": 2},
        "curve": [1],
        "evaluate": ["--suite", "study", "--drift-samples", "16", "--steps", "2"],
    }
    said["arms"] = {name: arm | {"budget": {"steps": 2}} for name, arm in SMALL["arms"].items()}
    path.write_text(yaml.safe_dump(said))
    command = [sys.executable, "tools/sweep.py", str(path)]
    subprocess.run(command, check=True)
    result = json.loads((out / "report.json").read_text())
    assert len(result["contrasts"]) == 3 and result["contrasts"][0]["p"] is None  # one seed
    assert [point["iteration"] for point in result["measures"]["best"]["curves"]["soar"]] == [1, 2]
    written = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*") if file.is_file()}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "0 of 2 runs to do" in again.stdout
    assert written == {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*") if file.is_file()}
