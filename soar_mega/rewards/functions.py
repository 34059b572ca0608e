"""A reward of the user's own, named as module:name: a class that is a scorer, or a function."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from soar_mega.evaluation.scorer import Scorer
from soar_mega.rewards.judging import BrokenScorer, numbers


def scorer_of(path: str, entry: str = "") -> Scorer:
    """What module:name is: an instance of a class, which is made without arguments, or a function.

    Args:
        entry: which of the values it is, where a function gives several by name.

    Raises:
        ValueError: there is no such thing, its module cannot be imported, or the class is no `Scorer`.
    """
    found = _find(path)
    if not isinstance(found, type):
        return FunctionScorer(found, path, entry)
    if entry:
        raise ValueError(f"the scorer {path}#{entry}: #NAME goes with a function, and this is a class")
    try:
        scorer: Scorer = found()
    except TypeError as error:
        raise ValueError(f"the scorer {path} cannot be made without arguments: {error}") from error
    if lacks := [name for name in ("name", "version", "weights_hash", "score") if not hasattr(scorer, name)]:
        raise ValueError(f"the scorer {path} is a class without {', '.join(lacks)}, which a scorer has")
    return scorer


class FunctionScorer:
    """Calls fn(images [N, 3, H, W] in [0, 1], prompts, metadata), which gives [N] numbers, or {name: [N]}."""

    version = "of the user"
    weights_hash = ""

    def __init__(self, function: Callable[..., Any], path: str, entry: str = "") -> None:
        """
        Args:
            path: module:function.
            entry: which of the values it is, where the function gives several by name.
        """
        self._function = function
        self._path = path
        self._entry = entry
        self.name = entry or path.partition(":")[2]

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        given = self._function(images, prompts, metadata)
        if not isinstance(given, Mapping):
            given = {self.name: given}
        entry = self._entry or (next(iter(given)) if len(given) == 1 else "")
        if entry not in given:
            raise BrokenScorer(
                f"{self._path} gives the values {sorted(given)}: choose one as {self._path}#NAME"
            )
        return {self.name: numbers(self.name, given[entry], len(images))}


def _find(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    scorer = f"the scorer {path}"
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        where = "; its folder must be on PYTHONPATH" if is_itself else ""
        raise ValueError(f"{scorer}: {error}{where}") from error
    except Exception as error:  # the user's module runs, and fails in any way it likes
        raise ValueError(f"{scorer} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{scorer} is not there: {module} has no function or class {name}")
    return function  # type: ignore[no-any-return]
