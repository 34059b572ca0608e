"""Trains the text encoders of the tiny pipeline to say what a caption asks for; afterwards they stay frozen."""

import logging

import numpy as np
import torch
from base.vocabulary import TEXT_LENGTH
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from soar_mega.examples.digits.canvases import COLOURS, KINDS, RELATIONS, Caption, draw_caption

log = logging.getLogger(__name__)

STEPS, BATCH, LEARNING_RATE = 1500, 128, 3e-3
# Classes of each slot of a caption, 0 where it says nothing: kind, count, relation, four digits, two colours.
SLOTS = (len(KINDS), 5, len(RELATIONS) + 1, 11, 11, 11, 11, len(COLOURS) + 1, len(COLOURS) + 1)


def caption_slots(caption: Caption) -> list[int]:
    digits = [d + 1 for d in caption.digits] + [0] * (4 - len(caption.digits))
    colours = [list(COLOURS).index(c) + 1 for c in caption.colours] + [0] * (2 - len(caption.colours))
    relation = 0 if caption.relation is None else list(RELATIONS).index(caption.relation) + 1
    return [list(KINDS).index(caption.kind), caption.count, relation, *digits, *colours]


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def what_the_transformer_sees(encoder: nn.Module, ids: Tensor) -> list[Tensor]:
    """The outputs that SD3 takes from an encoder, for ids [B, S]: CLIP's pooled vector [B, D] and last but one hidden
    state [B, S, D], T5's last hidden state [B, S, D]."""
    if isinstance(encoder, T5EncoderModel):
        return [encoder(ids).last_hidden_state]
    out = encoder(ids, output_hidden_states=True)
    return [out.text_embeds, out.hidden_states[-2]]


def train_encoder(encoder: nn.Module, tokenizer: CLIPTokenizer | T5Tokenizer, seed: int) -> nn.Module:
    """Linear heads on each output of the encoder classify the slots of random captions; the heads are thrown away."""
    rng = np.random.default_rng(seed)
    kinds = list(KINDS)
    widths = [x.shape[-1] for x in what_the_transformer_sees(encoder, tokenize(tokenizer, [""]))]
    heads = nn.ModuleList(nn.Linear(width, sum(SLOTS)) for width in widths)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    encoder.train()
    for step in range(STEPS):
        captions = [draw_caption(rng, kinds[rng.integers(len(kinds))]) for _ in range(BATCH)]
        slots = torch.tensor([caption_slots(caption) for caption in captions])
        outputs = what_the_transformer_sees(
            encoder, tokenize(tokenizer, [caption.text for caption in captions])
        )
        logits = [head(x.mean(1) if x.ndim == 3 else x) for head, x in zip(heads, outputs, strict=True)]
        # The transformer's embedders do not normalise what they take: hold it at a mean square of 1.
        scale = torch.stack([(x.square().mean() - 1).square() for x in outputs]).sum()
        loss = torch.stack([_slot_loss(x, slots) for x in logits]).sum()
        optimizer.zero_grad()
        (loss + scale).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            right = " ".join(f"{_all_right(x, slots):.3f}" for x in logits)
            name = type(encoder).__name__
            log.info(
                "%s step %d/%d | loss %.4f | captions fully right %s",
                name,
                step + 1,
                STEPS,
                loss.item(),
                right,
            )
    return encoder.eval().requires_grad_(False)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str]) -> Tensor:
    """-> ids [B, TEXT_LENGTH], padded as diffusers' SD3 pipeline does."""
    return tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def _slot_loss(logits: Tensor, slots: Tensor) -> Tensor:
    parts = zip(logits.split(SLOTS, dim=1), slots.unbind(1), strict=True)
    return torch.stack([nn.functional.cross_entropy(x, y) for x, y in parts]).sum()


def _all_right(logits: Tensor, slots: Tensor) -> float:
    guesses = torch.stack([x.argmax(1) for x in logits.split(SLOTS, dim=1)], dim=1)
    return (guesses == slots).all(1).float().mean().item()
