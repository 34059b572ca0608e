"""The frozen text encoders of a diffusers pipeline."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from soar_mega.data.encoder_facts import TextOutput, TextPart, class_name, loading
from soar_mega.data.finite import check_finite


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder and its tokenizer."""

    facts: TextPart
    model: Any
    tokenizer: Any

    @staticmethod
    def load(folder: Path, facts: TextPart, device: torch.device, dtype: torch.dtype) -> "TextEncoder":
        """From a pipeline folder. ValueError: it or its tokenizer cannot be loaded."""
        part = facts.part
        with _no_progress_bars(), loading(folder / part):
            model, told = _class(folder, part).from_pretrained(
                folder / part, dtype=dtype, output_loading_info=True
            )
        tokenizer = load_tokenizer(folder, facts)
        if missing := sorted(told["missing_keys"]):  # which transformers would fill with random numbers
            config = folder / part / "config.json"
            raise ValueError(
                f"{folder / part} cannot be loaded: the weights lack {missing[0]}, which {config} implies "
                f"({len(missing)} missing in all): fetch the folder again"
            )
        model = model.to(device).eval().requires_grad_(False)
        check_finite(model, folder / part)
        return TextEncoder(facts=facts, model=model, tokenizer=tokenizer)

    def cuts(self, prompt: str) -> bool:
        """Whether `encode` takes the beginning of a prompt only."""
        return count_tokens(self.tokenizer, prompt) > self.facts.length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextOutput:
        """Prompts -> tokens [B, length, width] and pooled [B, P], one of them None where it is not used."""
        facts = self.facts
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=facts.length, truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.model.device)
        return facts.read(self.model(ids, output_hidden_states=facts.hidden_states))


def load_tokenizer(folder: Path, facts: TextPart) -> Any:
    """That of one text encoder of a pipeline folder. ValueError: it cannot be loaded."""
    part = facts.part.replace("text_encoder", "tokenizer")
    with loading(folder / part):
        return _class(folder, part).from_pretrained(folder / part)


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Of the whole prompt, before it is cut."""
    return len(tokenizer(prompt, verbose=False).input_ids)


def _class(folder: Path, part: str) -> Any:
    name = class_name(folder, part)
    if name is None:
        raise ValueError(f"{folder / 'model_index.json'} names no {part}, which its text encoders need")
    found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"{folder / 'model_index.json'}: {part} is {name!r}, which is no class of transformers"
        )
    return found


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar per encoder, even where nobody looks."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
