"""Prompts that are encoded once, before what draws them takes the memory."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.data.encoder_facts import TextOutput, TextPart, encoder_facts
from soar_mega.distributed import device
from soar_mega.models.common.conditions import Conditions
from soar_mega.user_files import is_text

log = logging.getLogger(__name__)

BATCH = 32  # prompts that are encoded together


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """What the text encoders made of prompts and of the empty (or a negative) prompt, on the CPU."""

    conditions: Conditions  # [N]
    empty: Conditions  # [1]

    def __len__(self) -> int:
        return len(self.conditions)


def encode_prompts(
    pipeline_dir: str | Path,
    prompts: Sequence[str],
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int | None = None,
    negative_prompt: str = "",
    batch_size: int = BATCH,
) -> EncodedPrompts:
    """Encode prompts with one text encoder of a pipeline folder after another, on this process's device.

    The device never holds more than one of them, and none on return.

    Args:
        dtype: of the text encoders and of the embeddings they make.
        negative_prompt: what guidance leads away from, in the place of the empty prompt.
        max_sequence_length: T5 tokens; None: as `encoder_facts`.
        batch_size: prompts that are encoded together; the last bits of an embedding may depend on it.

    Raises:
        ValueError: a prompt is no text, or a part of the folder is missing or damaged.
    """
    for prompt in (*prompts, negative_prompt):
        if not is_text(prompt):
            raise ValueError(
                f"the prompt {prompt!r} is no text: it holds bytes that are not UTF-8, or half a character"
            )
    folder = Path(pipeline_dir)
    facts = encoder_facts(folder, max_sequence_length)
    every = [*prompts, negative_prompt]
    outputs = [_encoded_by(part, folder, dtype, every, batch_size) for part in facts.texts]
    text, pooled = (tensor.to(dtype) for tensor in facts.join(outputs, facts))
    return EncodedPrompts(
        conditions=Conditions(text[:-1], pooled[:-1]), empty=Conditions(text[-1:], pooled[-1:])
    )


def _encoded_by(
    part: TextPart, folder: Path, dtype: torch.dtype, prompts: list[str], batch_size: int
) -> TextOutput:
    """Tokens and pooled of all prompts by one text encoder, of which nothing is left on the device afterwards."""
    from soar_mega.data.text_encoder import TextEncoder  # brings transformers, which most runs do not need

    encoder = TextEncoder.load(folder, part, device(), dtype)
    if cut := sum(map(encoder.cuts, prompts)):
        log.warning("%d of %d prompts are longer than %s takes and are cut", cut, len(prompts) - 1, part.part)
    tokens: list[Tensor] = []
    pooled: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        of_tokens, of_prompts = encoder.encode(prompts[start : start + batch_size])
        tokens += [] if of_tokens is None else [of_tokens.cpu()]
        pooled += [] if of_prompts is None else [of_prompts.cpu()]
    del encoder, of_tokens, of_prompts
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return torch.cat(tokens) if tokens else None, torch.cat(pooled) if pooled else None
