"""training_facts.json of an export: how its transformer was trained, for programs that go on from it.

A pipeline folder has no place for it: diffusers takes 256 or 512 T5 tokens for a prompt whatever the training took, and
leaves files that it does not know alone.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from soar_mega.user_files import read_object, whole

FILE = "training_facts.json"


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """None is what nothing is known of.

    Attributes:
        dtype: of the weights in this folder: fp32, bf16 or fp16; trained_dtype: that the model computed in.
        max_sequence_length: T5 tokens of a prompt; width, height: in pixels, of most of the samples.
        stage: the method; weights: current, or ema.
    """

    dtype: str
    trained_dtype: str | None = None
    max_sequence_length: int | None = None
    width: int | None = None
    height: int | None = None
    stage: str | None = None
    iteration: int | None = None
    weights: str | None = None

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def facts_of_copy(folder: str | Path, dtype: str | None, is_changed: bool) -> TrainingFacts | None:
    """Those of what is made of an export.

    Args:
        dtype: of the new numbers; None is that of the old ones.
        is_changed: by a training that is not known here; what was trained before it stays true of texts and sizes.
    """
    facts = read_facts(folder)
    if facts is None:
        return None
    facts = replace(facts, dtype=dtype or facts.dtype)
    return replace(facts, stage=None, iteration=None, weights=None) if is_changed else facts


def read_facts(folder: str | Path) -> TrainingFacts | None:
    """Those of an export; None where it holds none, as a folder of someone else's.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    values = read_object(path)
    for key in ("max_sequence_length", "width", "height"):
        if values.get(key) is not None:
            whole(values, key, path)
    try:
        return TrainingFacts(**values)
    except TypeError as error:
        raise ValueError(f"{path} is not what soar-mega writes there: {error}") from error
