"""Embeddings of prompts where samples are drawn: their values on the first pipeline stage, their shapes elsewhere."""

import torch
from torch import Tensor

from soar_mega.data.info import DatasetInfo
from soar_mega.data.prompt_cache import PromptCache
from soar_mega.models.common.conditions import Conditions


class PromptTexts:
    """A set of prompts. Those that were asked for last are held, on the CPU."""

    def __init__(self, cache: PromptCache, info: DatasetInfo, first_stage: bool) -> None:
        self._cache, self._info, self._first_stage = cache, info, first_stage
        self._held: tuple[list[int], Conditions, Conditions] | None = None

    def of(self, prompts: Tensor) -> tuple[Conditions, Conditions]:
        """Of prompts [K] int64 by their numbers, and of the empty one [1].

        Raises:
            ValueError: a file of them is missing or damaged.
        """
        numbers = prompts.tolist()
        if self._held is None or self._held[0] != numbers:
            if self._first_stage:
                self._held = numbers, self._cache.rows(prompts), self._cache.empty()
            else:
                self._held = numbers, self._blank(len(numbers)), self._blank(1)
        return self._held[1:]

    def _blank(self, count: int) -> Conditions:
        info, dtype = self._info, self._info.torch_text_dtype()
        text = torch.zeros(1, 1, 1, dtype=dtype).expand(count, *info.text_shape)
        return Conditions(text, torch.zeros(1, 1, dtype=dtype).expand(count, info.pooled_size))
