"""The floating point operations of FLUX's layers (soar_mega.models.flops)."""

from soar_mega.models.embeddings import TIMESTEP_CHANNELS
from soar_mega.models.flops import Tokens, Work
from soar_mega.models.flux.sizes import FluxSizes

# of 1024 x 1024 pixels, and T5's; CLIP's text is in the pooled vector alone
USUAL_TOKENS = Tokens(image=64 * 64, text=512)


def embedding_work(sizes: FluxSizes, tokens: Tokens) -> Work:
    """Patches, text, timestep, pooled text and guidance into the hidden size, in a forward of one sample."""
    hidden = sizes.hidden_size
    patches = tokens.image * sizes.patch_size**2 * sizes.in_channels
    text = tokens.text * sizes.joint_attention_dim
    waves = 2 if sizes.guidance_embeds else 1
    vectors = waves * TIMESTEP_CHANNELS + sizes.pooled_projection_dim
    return Work(
        embedding=2 * (patches + text + vectors) * hidden, conditioning=2 * (waves + 1) * hidden**2
    )


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


def output_work(sizes: FluxSizes, tokens: Tokens) -> Work:
    """Of the last modulation and of hidden states into patches, in a forward of one sample."""
    hidden = sizes.hidden_size
    patches = tokens.image * sizes.patch_size**2 * sizes.out_channels
    return Work(conditioning=2 * 2 * hidden**2, output=2 * patches * hidden)
