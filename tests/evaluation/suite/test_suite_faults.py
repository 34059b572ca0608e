"""What goes wrong in an evaluation: told before the first image where it can be, and nothing that is made is lost."""

import errno
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import BASE, GENEVAL, evaluate, kept, write_suite
from torch import Tensor

from soar_mega.checkpoints.model_source import find_source
from soar_mega.cli.evaluate_suite import explained, tell_text_lengths
from soar_mega.config import ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.evaluation.suite import store as store_module
from soar_mega.evaluation.suite.one_model import PICTURES, Cell, Place, run_model
from soar_mega.evaluation.suite.prompt_sets import Task, read_prompt_set
from soar_mega.evaluation.suite.store import Store
from soar_mega.evaluation.suite.suite_settings import Point, load_suite
from soar_mega.training.evaluating import Model
from soar_mega.training_facts import FILE as FACTS
from soar_mega.training_facts import TrainingFacts

ALONE = Place(replica=0, replicas=1, writes=True, rank=0, world_size=1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"tag": "colours", "prompt": "a red 8"}, "unknown tag 'colours'; the tags are single_object,"),
        ({"prompt": "a red 8"}, "the tag is missing, which other lines have"),
        ({"tag": "colors", "include": []}, "is not a JSON object with 'prompt'"),
        (
            {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a red dog"},
            "'dog' is no digit",
        ),
    ],
)
def test_a_bad_line_is_told_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any], words: str
) -> None:
    suite = write_suite(tmp_path)
    file = tmp_path / "digits" / "test_metadata.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (*GENEVAL[:2], line, GENEVAL[2])))
    assert evaluate(suite, tmp_path / "out", f"base={BASE}") == 1
    said = capsys.readouterr().err
    assert f"{file}:3" in said and words in said
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize(
    ("scorers", "words"),
    [
        (["clip_score"], "the scorer clip_score lacks"),
        (["no_such"], "there is no reward 'no_such'"),
    ],
)
def test_a_scorer_that_cannot_be_made_is_told_before_the_first_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scorers: list[str], words: str
) -> None:
    suite = write_suite(tmp_path, sets={"digits": {"prompts": "digits", "scorers": ["digits", *scorers]}})
    assert evaluate(suite, tmp_path / "out", f"base={BASE}", "--weights", str(tmp_path / "none")) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidence": 3}, "unknown key 'guidence'; the keys are guidance_scale"),
        ({"steps": [0]}, "steps: a whole number of at least 1 is expected, found 0"),
        ({"sets": {"a": {"prompts": "digits", "scorers": "digits"}}}, "sets.a: scorers: a list of names"),
        ({"sets": {"a/b": {"prompts": "digits", "scorers": ["digits"]}}}, "sets.a/b: a name of letters"),
    ],
)
def test_a_suite_that_cannot_be_is_told_by_its_key(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as told:
        load_suite(str(write_suite(tmp_path, **changes)))
    assert words in str(told.value)


def test_a_suite_is_read_as_recipes_are(tmp_path: Path) -> None:
    file = write_suite(tmp_path, guidance_scale=7.25)
    file.write_text(file.read_text().replace("7.25", "45e-1"))
    assert load_suite(str(file)).guidance_scales == (4.5,)
    file.write_text("guidance_scale: 1\nguidance_scale: 2\n")
    with pytest.raises(ValueError, match="the key 'guidance_scale' is given twice"):
        load_suite(str(file))


def test_what_others_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    assert evaluate(write_suite(tmp_path), out, f"base={BASE}") == 1
    assert "holds report.html, which this program did not write" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["report.html"] and (
        out / "report.html"
    ).read_text() == "mine"


class Painter:
    """Draws what it is told to, by prompt; a grey picture otherwise."""

    def __init__(self, images: dict[str, Tensor]) -> None:
        self._images = images

    def draw(self, tasks: Sequence[Task], point: Point) -> Tensor:
        grey = torch.full((3, 16, 16), 0.5)
        return torch.stack([self._images.get(task.item.prompt, grey) for task in tasks])


class Mean:
    """The mean of an image."""

    name, version, weights_hash = "mean", "1", ""

    def score(self, images: Tensor, prompts: Any, metadata: Any) -> dict[str, Tensor]:
        return {"mean": images.mean(dim=(1, 2, 3)).double()}


def _cell(folder: Path, scorer: Any) -> Cell:
    start_world(ParallelConfig())
    store = Store(folder / "out")
    store.check()
    settings = load_suite(str(write_suite(folder))).sets[0]
    return Cell(store, "painted", read_prompt_set(settings), Point(3.0, 2), {"model": "painter"}, [scorer])


def test_images_that_are_black_or_nan_are_told_of_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = torch.full((3, 16, 16), 0.5)
    broken[1, 2, 3] = torch.nan
    cell = _cell(tmp_path, Mean())
    painter = Painter({"a red 3": torch.zeros(3, 16, 16), "a blue 7": broken})
    with caplog.at_level(logging.WARNING, "soar_mega"):
        run_model("painted", [cell], ALONE, lambda prompts: painter, 8)
    assert "the image of 'a red 3' (guidance 3, 2 steps) is black" in caplog.text
    assert "the image of 'a blue 7' (guidance 3, 2 steps) is NaN" in caplog.text
    found = list(cell.values()[PICTURES].values())
    assert sum(each["black"] for each in found) == 1 and sum(each["NaN"] for each in found) == 1


def test_a_scorer_without_a_number_ends_the_evaluation_and_loses_nothing(tmp_path: Path) -> None:
    class Mute(Mean):
        def score(self, images: Tensor, prompts: Any, metadata: Any) -> dict[str, Tensor]:
            return {"mean": torch.full((len(images),), torch.nan)}

    cell = _cell(tmp_path, Mute())
    with pytest.raises(ValueError, match="scorer mean gave no finite value to .*png"):
        run_model("painted", [cell], ALONE, lambda prompts: Painter({}), 8)
    assert len(list((tmp_path / "out").glob("images/*/*/*.png"))) == 4


def test_a_new_version_of_a_scorer_judges_again_what_is_drawn(tmp_path: Path) -> None:
    run_model("painted", [_cell(tmp_path, Mean())], ALONE, lambda prompts: Painter({}), 8)

    class Newer(Mean):
        version = "2"

        def score(self, images: Tensor, prompts: Any, metadata: Any) -> dict[str, Tensor]:
            return {"mean": 2 * images.mean(dim=(1, 2, 3)).double()}

    cell = _cell(tmp_path, Newer())
    run_model("painted", [cell], ALONE, lambda prompts: pytest.fail("nothing is to be drawn"), 8)
    assert {each["mean"] for each in cell.values()["mean"].values()} == {2 * float(torch.tensor(128 / 255))}
    assert len(list((tmp_path / "out").glob("scores/*/digits.mean-*.jsonl"))) == 2


def test_a_full_disk_is_told_of_and_the_evaluation_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [2]

    def write(path: Path, content: bytes, mark: bytes, real: Any = store_module.write_file) -> None:
        if path.suffix == ".png":
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content, mark)

    (tmp_path / "whole").mkdir()
    run_model("painted", [_cell(tmp_path / "whole", Mean())], ALONE, lambda prompts: Painter({}), 1)
    cell = _cell(tmp_path, Mean())
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_file", write)
        words = "there is no room left for .*start the same command again"
        with pytest.raises(OSError, match=words), explained(str(tmp_path / "out")):
            run_model("painted", [cell], ALONE, lambda prompts: Painter({}), 1)
    assert len(list((tmp_path / "out").glob("images/*/*/*.png"))) == 2
    assert len(cell.values()["mean"]) == 2
    run_model("painted", [cell], ALONE, lambda prompts: Painter({}), 1)
    assert kept(tmp_path / "out", "painted") == kept(tmp_path / "whole" / "out", "painted")


def test_lengths_of_text_that_differ_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From what an export was trained with, and between models that are compared."""
    export = tmp_path / "export"
    shutil.copytree(BASE, export)
    (export / FACTS).write_text(TrainingFacts(dtype="fp32", max_sequence_length=7).to_json())
    with caplog.at_level(logging.WARNING, "soar_mega"):
        assert find_source(str(export)).text_length() == 7
        assert not caplog.text
        assert find_source(str(export), max_sequence_length=9).text_length() == 9
        assert f"{export} was trained with 7 T5 tokens of a prompt and is drawn with 9" in caplog.text
        caplog.clear()
        assert find_source(str(export), max_sequence_length=9).fingerprint()["max_sequence_length"] == 9
        assert not caplog.text  # it was said
        tell_text_lengths([Model(name=path.name, source=find_source(str(path))) for path in (BASE, export)])
        assert "prompts are cut at different numbers of T5 tokens: base 10, export 7" in caplog.text
