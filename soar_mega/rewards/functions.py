"""A reward that is a function of the user's own, named as module:function."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from soar_mega.rewards.judging import BrokenScorer


class FunctionScorer:
    """Calls fn(images [N, 3, H, W] in [0, 1], prompts, metadata), which gives [N] numbers, or {name: [N]}."""

    version = "of the user"
    weights_hash = ""

    def __init__(self, path: str, entry: str = "") -> None:
        """
        Args:
            path: module:function.
            entry: which of the values it is, where the function gives several by name.

        Raises:
            ValueError: there is no such function, or its module cannot be imported.
        """
        self._function = _find(path)
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
                f"{self._path} gives the values {sorted(given)}: choose one as {self._path}#NAME in stage.rewards"
            )
        return {self.name: given[entry]}


def _find(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    advice = f"stage.rewards names {path}"
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"{advice}: {error}; its folder must be on PYTHONPATH") from error
    except Exception as error:  # the user's module runs, and fails in any way it likes
        raise ValueError(f"{advice}, which cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{advice}, but {module} has no function {name}")
    return function  # type: ignore[no-any-return]
