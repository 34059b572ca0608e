"""The work of each part of a forward, counted in multiply-adds per sample."""

from soar_mega.models.config import MMDiTConfig
from soar_mega.models.embeddings import TIMESTEP_CHANNELS

TEXT_TOKENS = 77 + 256  # CLIP's and T5's, as the published recipes concatenate them


def image_tokens(config: MMDiTConfig) -> int:
    """Of the latents that the position table was made for."""
    return (config.sample_size // config.patch_size) ** 2


def embedding_multiply_adds(config: MMDiTConfig) -> int:
    """Patches, text and conditioning into the hidden size."""
    hidden = config.hidden_size
    patches = image_tokens(config) * config.patch_size**2 * config.in_channels * hidden
    text = TEXT_TOKENS * config.joint_attention_dim * hidden
    conditioning = (TIMESTEP_CHANNELS + config.pooled_projection_dim + 2 * hidden) * hidden
    return patches + text + conditioning


def layer_multiply_adds(config: MMDiTConfig, number: int) -> int:
    """Linears (qkv 3, output 1, MLP 8 times hidden^2 per token), attention (2 tokens^2 hidden) and adaLN."""
    hidden, image, is_last = config.hidden_size, image_tokens(config), number == config.num_layers - 1
    modulation = 6 + (2 if is_last else 6)
    linears = 12 * image + (3 if is_last else 12) * TEXT_TOKENS
    attention = 2 * (image + TEXT_TOKENS) ** 2
    if number in config.dual_attention_layers:
        modulation += 3
        linears += 4 * image
        attention += 2 * image**2
    return (modulation + linears) * hidden**2 + attention * hidden


def output_multiply_adds(config: MMDiTConfig) -> int:
    """The last modulation, and hidden states into patches."""
    hidden = config.hidden_size
    return 2 * hidden**2 + image_tokens(config) * hidden * config.patch_size**2 * config.out_channels
