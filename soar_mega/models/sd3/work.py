"""What an SD3 transformer computes, and what autograd keeps of it, in the terms of common/flops.py and memory.py."""

import math

from soar_mega.models.common.flops import Tokens, Work, image_tokens
from soar_mega.models.common.rank_tokens import RankTokens
from soar_mega.models.common.vector_embeddings import TIMESTEP_CHANNELS
from soar_mega.models.sd3.sizes import SD3Sizes

TEXT_TOKENS = 77 + 256  # CLIP's and T5's, as the published recipes concatenate them


def usual_tokens(sizes: SD3Sizes) -> Tokens:
    """Of the latents that the position table was made for, by which pipeline stages are cut."""
    return Tokens(image_tokens(sizes, (sizes.sample_size, sizes.sample_size)), TEXT_TOKENS)


def embedding_work(sizes: SD3Sizes, tokens: Tokens) -> Work:
    """Patches, text, timestep and pooled text into the hidden size, in a forward of one sample."""
    hidden = sizes.hidden_size
    patches = tokens.image * sizes.patch_size**2 * sizes.in_channels
    text = tokens.text * sizes.joint_attention_dim
    vectors = TIMESTEP_CHANNELS + sizes.pooled_projection_dim
    return Work(embedding=2 * (patches + text + vectors) * hidden, conditioning=4 * hidden**2)


def layer_work(sizes: SD3Sizes, number: int, tokens: Tokens) -> Work:
    """Of one layer in a forward of one sample.

    Linears are qkv 3, output 1 and MLP 8 times hidden^2 per token (the last layer's text: its qkv alone), attention is
    2 tokens^2 hidden, modulation hidden^2 for each shift, scale and gate.
    """
    hidden, is_last = sizes.hidden_size, number == sizes.num_layers - 1
    image, text, parts = 12, 3 if is_last else 12, 8 if is_last else 12
    pairs = sum(tokens) ** 2
    if number in sizes.dual_attention_layers:
        image, parts, pairs = image + 4, parts + 3, pairs + tokens.image**2
    return Work(
        image=2 * image * tokens.image * hidden**2,
        text=2 * text * tokens.text * hidden**2,
        attention=2 * 2 * pairs * hidden,
        conditioning=2 * parts * hidden**2,
    )


def layer_bytes(
    sizes: SD3Sizes, tokens: RankTokens, number: int, item: int, not_kept: frozenset[str]
) -> float:
    """What autograd keeps of a layer for one point, but its parts that are `not_kept` (`memory.not_kept`)."""
    hidden = sizes.hidden_size
    is_last, is_dual = number == sizes.num_layers - 1, number in sizes.dual_attention_layers
    norm, activation, qk = (name not in not_kept for name in ("layernorm", "mlp_act", "qk_layernorm"))
    mlp_norm = norm and "mlp_layernorm" not in not_kept
    elements = 0.0
    for stream in (0, 1):
        whole, cut = tokens.whole[stream], tokens.cut[stream]
        goes_on = stream == 1 or not is_last  # the last layer's text goes no further than into attention
        attentions = 2 if is_dual and stream == 1 else 1
        # what is modulated; q, k and v; the same of both streams; attention's result, and its padded copy
        elements += attentions * (norm * whole + 3 * cut + (1 + 3 * qk) * tokens.attending[stream])
        elements += attentions * goes_on * tokens.copied[stream]
        elements += whole  # the layer's input
        # attention's output, hidden states, what is modulated of them, the MLP's output; GELU's input and output
        elements += goes_on * ((3 + mlp_norm) * whole + (4 + 4 * activation) * cut) + (attentions - 1) * whole
    modulation = (2 if is_last else 6) + (9 if is_dual else 6)
    statistics = 4 * 2 * (2 * sum(tokens.whole) + (tokens.whole[1] if is_dual else 0))
    lengths = sum(tokens.attending) + (tokens.attending[1] if is_dual else 0)
    return item * hidden * (elements + modulation) + statistics + 4 * sizes.num_attention_heads * lengths


def embedding_bytes(sizes: SD3Sizes, latent_size: tuple[int, int], text_length: int, item: int) -> float:
    """Inputs of the embedders and what is between their layers."""
    patches = math.prod(latent_size) * sizes.in_channels
    text = text_length * sizes.joint_attention_dim
    conditioning = TIMESTEP_CHANNELS + sizes.pooled_projection_dim + 5 * sizes.hidden_size
    return item * (patches + text + conditioning)
