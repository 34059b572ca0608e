"""The prompts of an evaluation: which images are to be drawn, each with a name and a noise of its own.

A prompt that stands in several lines of its file gets one noise after the other, as in the test files of GenEval
(553 prompts in 2212 lines) and DrawBench (200 in 1000).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.prompt_files import read_prompts
from soar_mega.evaluation.scorers.gen_eval_rules import TAGS as GENEVAL_TAGS
from soar_mega.evaluation.suite.suite_settings import PromptSetSettings

TAG = "tag"  # of a line of GenEval's: what kind of prompt it is
TAGS = (*GENEVAL_TAGS, "ocr")  # the last of digits


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt.

    Attributes:
        key: of the prompt's text; names its images.
        line: where it stands in its file, for messages.
        position: where its noise stands in the keyed stream: of the text alone, not of its place in a file.
        category: its tag, "" where prompts have none.
        half: 0 or 1, by the text: settings are chosen on half 0 and reported on half 1.
    """

    key: str
    line: int
    prompt: str
    metadata: dict[str, Any]
    noises: int
    position: int
    category: str
    half: int


@dataclass(frozen=True)
class Task:
    """One image to be drawn."""

    item: Item
    noise: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.item.key}_{self.noise}"


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of one set.

    Attributes:
        hash: of all that its file says.
    """

    settings: PromptSetSettings
    path: Path
    hash: str
    items: list[Item]

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def tasks(self) -> list[Task]:
        """All images, those of a prompt together."""
        return [Task(item, noise) for item in self.items for noise in range(item.noises)]

    @property
    def categories(self) -> list[str]:
        """Those that there are; [""] where prompts have none."""
        found = {item.category for item in self.items}
        return [tag for tag in (*TAGS, "") if tag in found]


def read_prompt_set(settings: PromptSetSettings) -> PromptSet:
    """The prompts that a suite names.

    Raises:
        ValueError: the file is missing or holds a line that is no prompt, or one with an unknown tag; names file and
            line.
    """
    read = read_prompts(settings.prompts, settings.split, repeats=True)
    items = []
    for prompt, metadata, lines in zip(read.prompts, read.metadata, read.places, strict=True):
        tag = metadata.get(TAG, "")
        if tag and tag not in TAGS:
            raise ValueError(f"{read.path}:{lines[0]}: unknown {TAG} {tag!r}; the tags are {', '.join(TAGS)}")
        digest = hashlib.sha256(prompt.encode()).digest()
        items.append(
            Item(
                key=digest.hex()[:16],
                line=lines[0],
                prompt=prompt,
                metadata=metadata,
                noises=len(lines) * settings.noises,
                position=int.from_bytes(digest[:8], "little") >> 2,
                category=tag,
                half=digest[8] % 2,
            )
        )
    tagged = sum(bool(item.category) for item in items)
    if 0 < tagged < len(items):
        where = next(lines[0] for item, lines in zip(items, read.places, strict=True) if not item.category)
        raise ValueError(f"{read.path}:{where}: the {TAG} is missing, which other lines have")
    return PromptSet(settings=settings, path=read.path, hash=read.hash(), items=items)
