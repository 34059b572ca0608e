"""The frozen text encoders of a diffusers SD3 pipeline, two CLIPs and in most a T5, and what they make together."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from soar_mega.data.encoder_facts import EncoderFacts, class_name, has_t5, loading
from soar_mega.data.finite import check_finite

CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder and its tokenizer."""

    part: str  # of the pipeline folder
    model: Any
    tokenizer: Any
    is_clip: bool
    length: int  # tokens of a prompt

    @staticmethod
    def load(
        folder: Path, part: str, facts: EncoderFacts, device: torch.device, dtype: torch.dtype
    ) -> "TextEncoder":
        """From a pipeline folder; `part` is one of `parts`. ValueError: it or its tokenizer cannot be loaded."""
        tokenizer = part.replace("text_encoder", "tokenizer")
        with _no_progress_bars(), loading(folder / part):
            model, told = _class(folder, part).from_pretrained(
                folder / part, dtype=dtype, output_loading_info=True
            )
        with loading(folder / tokenizer):
            tokens = _class(folder, tokenizer).from_pretrained(folder / tokenizer)
        if missing := sorted(told["missing_keys"]):  # which transformers would fill with random numbers
            config = folder / part / "config.json"
            raise ValueError(
                f"{folder / part} cannot be loaded: the weights lack {missing[0]}, which {config} implies "
                f"({len(missing)} missing in all): fetch the folder again"
            )
        model = model.to(device).eval().requires_grad_(False)
        check_finite(model, folder / part)
        # diffusers cuts both CLIPs at the length of the first one's tokenizer
        clip_length = facts.text_shape[0] - facts.max_sequence_length
        return TextEncoder(
            part=part,
            model=model,
            tokenizer=tokens,
            is_clip=part in CLIPS,
            length=clip_length if part in CLIPS else facts.max_sequence_length,
        )

    def cuts(self, prompt: str) -> bool:
        """Whether `encode` takes the beginning of a prompt only."""
        return len(self.tokenizer(prompt, verbose=False).input_ids) > self.length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> tokens [B, length, width] and, of a CLIP, their projection [B, P]."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        output = self.model(tokens.input_ids.to(self.model.device), output_hidden_states=self.is_clip)
        return (output.hidden_states[-2], output[0]) if self.is_clip else (output[0], None)


def parts(folder: Path) -> tuple[str, ...]:
    """The text encoders of a pipeline folder, in the order in which `joined` takes their outputs."""
    return (*CLIPS, T5) if has_t5(folder) else CLIPS


def joined(outputs: Sequence[tuple[Tensor, Tensor | None]], facts: EncoderFacts) -> tuple[Tensor, Tensor]:
    """What `parts` made -> (text [B, S, D], pooled [B, P]), as StableDiffusion3Pipeline.encode_prompt makes them.

    The two CLIPs' last hidden states but one side by side, padded with zeros to T5's width, then T5's tokens (zeros
    where the pipeline has no T5); pooled are both CLIPs' projections.
    """
    clip = torch.cat([tokens for tokens, pooled in outputs if pooled is not None], dim=-1)
    t5 = [tokens for tokens, pooled in outputs if pooled is None]
    if not t5:
        t5 = [clip.new_zeros(len(clip), facts.max_sequence_length, facts.text_shape[1])]
    clip = nn.functional.pad(clip, (0, t5[0].shape[-1] - clip.shape[-1]))
    pooled = torch.cat([pooled for _, pooled in outputs if pooled is not None], dim=-1)
    return torch.cat([clip, *t5], dim=-2), pooled


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
