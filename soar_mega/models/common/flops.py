"""The floating point operations of a model, by what does them: two for each multiplication of a matrix product.

Equal to what `torch.utils.flop_counter` finds, forward and backward. Padding and the points that only fill up a
micro-batch are not counted: they are no work that was asked for.
"""

from dataclasses import astuple, dataclass
from typing import NamedTuple

from soar_mega.config import ModelConfig
from soar_mega.models.common.sizes import Sizes


class Tokens(NamedTuple):
    """Tokens of a sample, without padding."""

    image: int
    text: int


class Shares(NamedTuple):
    """How much is trained of the linears over the image's tokens in the layers, and of those over the text's."""

    image: float
    text: float


ADAPTERS_ALONE = Shares(0.0, 0.0)


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

    def backward_to(self, trained: Shares) -> "Work":
        """Where not all is trained: the gradients of the inputs, of what is trained, and of both factors in attention.

        What adapters themselves compute, about a hundredth, is left out, and so are the linears on one vector.
        """
        image, text = round((1 + trained.image) * self.image), round((1 + trained.text) * self.text)
        return Work(image=image, text=text, attention=2 * self.attention, output=self.output)

    def __add__(self, other: "Work") -> "Work":
        return Work(**{kind: count + getattr(other, kind) for kind, count in vars(self).items()})

    def __rmul__(self, times: float) -> "Work":
        return Work(**{kind: round(times * count) for kind, count in vars(self).items()})


def image_tokens(sizes: Sizes, latent_size: tuple[int, int]) -> int:
    """Of latents of (height, width)."""
    height, width = latent_size
    return (height // sizes.patch_size) * (width // sizes.patch_size)


def output_work(sizes: Sizes, tokens: Tokens) -> Work:
    """Of the last modulation and of hidden states into patches, in a forward of one sample."""
    hidden = sizes.hidden_size
    patches = tokens.image * sizes.patch_size**2 * sizes.out_channels
    return Work(conditioning=2 * 2 * hidden**2, output=2 * patches * hidden)


def forward_work(sizes: Sizes, tokens: Tokens) -> Work:
    """Of a whole forward of one sample."""
    layers = (sizes.family.layer_work(sizes, number, tokens) for number in range(sizes.num_layers))
    return sum(layers, sizes.family.embedding_work(sizes, tokens) + output_work(sizes, tokens))


def recomputed_work(sizes: Sizes, tokens: Tokens, model: ModelConfig) -> Work:
    """What the backward of one sample computes once more.

    It is no work of the model: MFU leaves it out. The scores that a fused attention makes again are in neither.
    """
    layers = {number: sizes.family.layer_work(sizes, number, tokens) for number in range(sizes.num_layers)}
    if model.recompute_granularity == "full":
        return sum((work for number, work in layers.items() if number % model.recompute_every == 0), Work())
    if "core_attn" in model.made_again:
        return Work(attention=sum(work.attention for work in layers.values()))
    return Work()


def step_work(forward: Work, answers: float, points: int, trained: Shares | None = None) -> Work:
    """Of a step: `answers` forwards of one sample without a gradient, `points` forwards with their backward.

    Args:
        trained: None: everything.
    """
    backward = forward.backward if trained is None else forward.backward_to(trained)
    return (answers + points) * forward + points * backward
