"""Prompts that are encoded once, before what draws them takes the memory."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soar_mega.data.encoder_facts import EncoderFacts, TextOutput, TextPart, encoder_facts
from soar_mega.distributed import device
from soar_mega.models.common.conditions import Conditions
from soar_mega.user_files import is_text

if TYPE_CHECKING:
    from soar_mega.data.text_encoder import TextEncoder

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
    folder, every = Path(pipeline_dir), [*prompts, negative_prompt]
    _check_texts(every)
    facts, outputs = encoder_facts(folder, max_sequence_length), []
    for part in facts.texts:
        with _loaded(folder, [part], dtype) as encoders:
            outputs.append(_encoded_by(encoders[0], every, batch_size))
    return _joined(facts, outputs, dtype)


@contextlib.contextmanager
def prompt_encoders(
    pipeline_dir: str | Path, dtype: torch.dtype, max_sequence_length: int | None
) -> Iterator[Callable[[Sequence[str]], EncodedPrompts]]:
    """What encodes prompts, and the empty one, piece by piece, as `encode_prompts`: for more than memory holds at once.

    All text encoders are on the device, side by side and loaded once, until the end of the context.

    Raises:
        ValueError: a part of the folder is missing or damaged.
    """
    folder = Path(pipeline_dir)
    facts = encoder_facts(folder, max_sequence_length)
    with _loaded(folder, facts.texts, dtype) as encoders:

        def encode(prompts: Sequence[str]) -> EncodedPrompts:
            _check_texts(prompts)
            return _joined(facts, [_encoded_by(each, [*prompts, ""], BATCH) for each in encoders], dtype)

        yield encode


def _check_texts(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if not is_text(prompt):
            raise ValueError(
                f"the prompt {prompt!r} is no text: it holds bytes that are not UTF-8, or half a character"
            )


@contextlib.contextmanager
def _loaded(folder: Path, parts: Sequence[TextPart], dtype: torch.dtype) -> Iterator[list["TextEncoder"]]:
    """Text encoders of a pipeline folder, of which nothing is left on the device afterwards."""
    from soar_mega.data.text_encoder import TextEncoder  # brings transformers, which most runs do not need

    encoders = [TextEncoder.load(folder, part, device(), dtype) for part in parts]
    try:
        yield encoders
    finally:
        encoders.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _encoded_by(encoder: "TextEncoder", prompts: list[str], batch_size: int) -> TextOutput:
    """Tokens and pooled of all prompts, the last of which is not one of a user's, on the CPU."""
    if cut := sum(map(encoder.cuts, prompts)):
        log.warning(
            "%d of %d prompts are longer than %s takes and are cut", cut, len(prompts) - 1, encoder.facts.part
        )
    tokens: list[Tensor] = []
    pooled: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        of_tokens, of_prompts = encoder.encode(prompts[start : start + batch_size])
        tokens += [] if of_tokens is None else [of_tokens.cpu()]
        pooled += [] if of_prompts is None else [of_prompts.cpu()]
    return torch.cat(tokens) if tokens else None, torch.cat(pooled) if pooled else None


def _joined(facts: EncoderFacts, outputs: list[TextOutput], dtype: torch.dtype) -> EncodedPrompts:
    """What the encoders made of prompts, and of the last one as the empty prompt."""
    text, pooled = (tensor.to(dtype) for tensor in facts.join(outputs, facts))
    return EncodedPrompts(
        conditions=Conditions(text[:-1], pooled[:-1]), empty=Conditions(text[-1:], pooled[-1:])
    )
