"""What a FLUX transformer computes, and what of it autograd keeps: counted as in common/flops.py and memory.py."""

import math

from soar_mega.models.common.flops import Tokens, Work
from soar_mega.models.common.rank_tokens import RankTokens
from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS
from soar_mega.models.flux.sizes import FluxSizes

USUAL = Tokens(image=64 * 64, text=512)  # of 1024 x 1024 pixels, and T5's: CLIP gives the pooled vector alone


def usual_tokens(sizes: FluxSizes) -> Tokens:
    """By which pipeline stages are cut."""
    return USUAL


def embedding_work(sizes: FluxSizes, tokens: Tokens) -> Work:
    """Patches, text, timestep, pooled text and guidance into the hidden size, in a forward of one sample."""
    hidden = sizes.hidden_size
    patches = tokens.image * sizes.patch_size**2 * sizes.in_channels
    text = tokens.text * sizes.joint_attention_dim
    waves = 2 if sizes.guidance_embeds else 1
    vectors = waves * TIMESTEP_CHANNELS + sizes.pooled_projection_dim
    return Work(embedding=2 * (patches + text + vectors) * hidden, conditioning=2 * (waves + 1) * hidden**2)


def layer_work(sizes: FluxSizes, number: int, tokens: Tokens) -> Work:
    """Of one layer in a forward of one sample.

    Linears are qkv 3, output 1 and MLP 8 times hidden^2 per token in layers of both kinds, attention is
    2 tokens^2 hidden, modulation hidden^2 for each shift, scale and gate: 12 in a double layer, 3 in a single one.
    """
    hidden = sizes.hidden_size
    parts = 12 if number < sizes.num_double_layers else 3
    return Work(
        image=2 * 12 * tokens.image * hidden**2,
        text=2 * 12 * tokens.text * hidden**2,
        attention=2 * 2 * sum(tokens) ** 2 * hidden,
        conditioning=2 * parts * hidden**2,
    )


def layer_bytes(
    sizes: FluxSizes, tokens: RankTokens, number: int, item: int, not_kept: frozenset[str]
) -> float:
    """What autograd keeps of a layer for one point, but its parts that are `not_kept` (`memory.not_kept`)."""
    whole, cut, attending, copied = (sum(part) for part in vars(tokens).values())
    norm, activation, qk = (name not in not_kept for name in ("layernorm", "mlp_act", "qk_layernorm"))
    mlp_norm = norm and "mlp_layernorm" not in not_kept
    # qkv; q, k and v apart, attention's result and its padded copy; the MLP's 4 before and after GELU
    elements = 3 * cut + (1 + 3 * qk) * attending + copied + (4 + 4 * activation) * cut
    if number < sizes.num_double_layers:
        # the layer's input, what is modulated twice, attention's output, hidden states, the MLP's output
        elements, parts, norms = elements + (4 + norm + mlp_norm) * whole, 12, 2
    else:
        # the joined input, what is modulated, the sum of both branches
        elements, parts, norms = elements + (2 + norm) * whole, 3, 1
    statistics = 4 * (2 * norms * whole + sizes.num_attention_heads * attending)
    return item * sizes.hidden_size * (elements + parts) + statistics


def embedding_bytes(sizes: FluxSizes, latent_size: tuple[int, int], text_length: int, item: int) -> float:
    """Inputs of the embedders and what is between their layers."""
    patches = math.prod(latent_size) * sizes.in_channels
    text = text_length * sizes.joint_attention_dim
    waves = 2 if sizes.guidance_embeds else 1
    conditioning = (
        waves * TIMESTEP_CHANNELS + sizes.pooled_projection_dim + (2 * waves + 3) * sizes.hidden_size
    )
    return item * (patches + text + conditioning)
