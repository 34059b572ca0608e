"""The floating point operations of a model, by what does them: two for each multiplication of a matrix product.

Equal to what `torch.utils.flop_counter` finds, forward and backward. Padding and the points that only fill up a
micro-batch are not counted: they are no work that was asked for.
"""

from dataclasses import astuple, dataclass
from typing import NamedTuple

from soar_mega.models.config import MMDiTConfig
from soar_mega.models.embeddings import TIMESTEP_CHANNELS

TEXT_TOKENS = 77 + 256  # CLIP's and T5's, as the published recipes concatenate them


class Tokens(NamedTuple):
    """Tokens of a sample, without padding."""

    image: int
    text: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating point operations; of different works the sums and multiples."""

    image: int = 0  # linears over the image's tokens in the layers
    text: int = 0  # and over the text's
    attention: int = 0  # scores and their products with the values
    conditioning: int = (
        0  # linears on one vector per sample: modulation, and the second ones of timestep and pooled text
    )
    embedding: int = 0  # the first linears that the inputs meet
    output: int = 0  # hidden states into patches

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @property
    def token_linears(self) -> int:
        """What is computed in FP8 where that is on; the rest is not."""
        return self.image + self.text

    @property
    def backward(self) -> "Work":
        """Of the backward of this forward: the gradients of both factors, but no input's."""
        return Work(**{**vars(2 * self), "embedding": self.embedding})

    def __add__(self, other: "Work") -> "Work":
        return Work(**{kind: count + getattr(other, kind) for kind, count in vars(self).items()})

    def __rmul__(self, times: int) -> "Work":
        return Work(**{kind: times * count for kind, count in vars(self).items()})


def image_tokens(config: MMDiTConfig, latent_size: tuple[int, int]) -> int:
    """Of latents of (height, width)."""
    height, width = latent_size
    return (height // config.patch_size) * (width // config.patch_size)


def usual_tokens(config: MMDiTConfig) -> Tokens:
    """Of the latents that the position table was made for, by which pipeline stages are cut."""
    return Tokens(image_tokens(config, (config.sample_size, config.sample_size)), TEXT_TOKENS)


def embedding_work(config: MMDiTConfig, tokens: Tokens) -> Work:
    """Patches, text, timestep and pooled text into the hidden size, in a forward of one sample."""
    hidden = config.hidden_size
    patches = tokens.image * config.patch_size**2 * config.in_channels
    text = tokens.text * config.joint_attention_dim
    vectors = TIMESTEP_CHANNELS + config.pooled_projection_dim
    return Work(embedding=2 * (patches + text + vectors) * hidden, conditioning=4 * hidden**2)


def layer_work(config: MMDiTConfig, number: int, tokens: Tokens) -> Work:
    """Of one layer in a forward of one sample.

    Linears are qkv 3, output 1 and MLP 8 times hidden^2 per token (the last layer's text: its qkv alone), attention is
    2 tokens^2 hidden, modulation hidden^2 for each shift, scale and gate.
    """
    hidden, is_last = config.hidden_size, number == config.num_layers - 1
    image, text, parts = 12, 3 if is_last else 12, 8 if is_last else 12
    pairs = sum(tokens) ** 2
    if number in config.dual_attention_layers:
        image, parts, pairs = image + 4, parts + 3, pairs + tokens.image**2
    return Work(
        image=2 * image * tokens.image * hidden**2,
        text=2 * text * tokens.text * hidden**2,
        attention=2 * 2 * pairs * hidden,
        conditioning=2 * parts * hidden**2,
    )


def output_work(config: MMDiTConfig, tokens: Tokens) -> Work:
    """Of the last modulation and of hidden states into patches, in a forward of one sample."""
    hidden = config.hidden_size
    patches = tokens.image * config.patch_size**2 * config.out_channels
    return Work(conditioning=2 * 2 * hidden**2, output=2 * patches * hidden)


def forward_work(config: MMDiTConfig, tokens: Tokens) -> Work:
    """Of a whole forward of one sample."""
    layers = (layer_work(config, number, tokens) for number in range(config.num_layers))
    return sum(layers, embedding_work(config, tokens) + output_work(config, tokens))


def recomputed_work(config: MMDiTConfig, tokens: Tokens, granularity: str, every: int = 1) -> Work:
    """What the backward of one sample computes once more, by model.recompute_granularity and recompute_every.

    It is no work of the model: MFU leaves it out. The scores that a fused attention makes again are in neither.
    """
    layers = {number: layer_work(config, number, tokens) for number in range(config.num_layers)}
    if granularity == "full":
        return sum((work for number, work in layers.items() if number % every == 0), Work())
    if granularity == "selective":
        return Work(attention=sum(work.attention for work in layers.values()))
    return Work()


def step_work(forward: Work, answers: int, points: int) -> Work:
    """Of a step: `answers` forwards of one sample without a gradient, `points` forwards with their backward."""
    return (answers + points) * forward + points * forward.backward
