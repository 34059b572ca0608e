"""docs/settings.md says what the dataclasses of the settings say, and has a place for each of them."""

import re
from dataclasses import dataclass, field, fields

import pytest
import settings_page

from soar_mega.config import Recipe
from soar_mega.rules import at_least, one_of
from soar_mega.stages import SETTINGS, SftConfig


@dataclass(kw_only=True)
class Walk:
    """How far.

    Attributes:
        rules: none.
    """

    steps: int = 4  # <n> steps
    # by foot | by
    # tram
    way: str = "foot"
    tickets: list[str] = field(  # for a *tram*
        default_factory=lambda: ["#1"]
    )


@dataclass(kw_only=True)
class LongWalk(Walk):
    steps: int = 400
    rest: float | None = None


@dataclass(kw_only=True)
class WalkingConfig(SftConfig):
    """Training by foot."""

    name: str = "walking"
    logit_std: float = 3.0
    strides: int = 2  # of a step


def test_the_page_is_made_of_the_settings_that_are_there() -> None:
    assert settings_page.PAGE.read_text() == settings_page.page(), "run python tools/settings_page.py"


def test_every_setting_is_on_the_page_with_words() -> None:
    rows = re.findall(r"^\| `(\w+\.\w+)` \| .+ \| `.+` \| (.*) \|$", settings_page.page(), re.MULTILINE)
    names = set()
    for settings in SETTINGS.values():
        recipe = Recipe(stage=settings())  # type: ignore[call-arg]  # each has its name
        groups = {group.name: getattr(recipe, group.name) for group in fields(recipe)}
        names |= {f"{name}.{setting.name}" for name, group in groups.items() for setting in fields(group)}
    assert {name for name, words in rows if words.strip()} == names and all(words for _, words in rows)


def test_words_are_the_comments_above_and_beside() -> None:
    rules = {"walk.steps": at_least(1), "walk.way": one_of("foot", "tram")}
    assert settings_page.title(Walk) == "How far."
    assert settings_page.rows("walk", Walk, rules)[2:] == [
        r"| `walk.steps` | `int`, at least 1 | `4` | \<n> steps |",
        r"| `walk.way` | one of foot, tram | `foot` | by foot \| by tram |",
        r'| `walk.tickets` | `list[str]` | `["#1"]` | for a \*tram\* |',
    ]


def test_words_are_inherited_and_must_be_there() -> None:
    assert settings_page.words(LongWalk, "steps") == r"\<n> steps"
    with pytest.raises(ValueError, match=r"LongWalk\.rest has no words: write a comment beside it"):
        settings_page.rows("walk", LongWalk, {})


def test_a_new_stage_comes_by_itself() -> None:
    page = settings_page.page({**SETTINGS, "walking": WalkingConfig})
    _, _, section = page.partition("### stage.name: walking\n\nTraining by foot.\n")
    section, _, _ = section.partition("\n## ")
    assert [line for line in section.splitlines() if line.startswith("| `")] == [
        "| `stage.logit_std` | `float`, above 0 | `3.0` | with logit_normal: its standard deviation |",
        "| `stage.strides` | `int` | `2` | of a step |",
    ]
    # and there may be more of them between these
    assert re.search(r"^### stage\.name: soar, sft, sft_multi, mixflow, (\w+, )*walking$", page, re.MULTILINE)
