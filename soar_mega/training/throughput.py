"""Floating point operations per second of a run, and how much of the GPU's peak they are (MFU).

Counted is what the training method asks for: the answers' forwards, and forward and backward of each point, and the
forwards that draw a collection. What is computed again (recomputation), padding, and points that fill up the last
micro-batch are not.
"""

import torch
import torch.distributed as dist

from soar_mega.config import Recipe
from soar_mega.data.batch import Batch
from soar_mega.gpus import peak_tflops
from soar_mega.models.common.flops import Tokens, Work, forward_work, image_tokens, step_work
from soar_mega.models.common.rank_parameters import trained_shares
from soar_mega.models.common.sizes import Sizes
from soar_mega.stages import CollectingConfig


class Throughput:
    """Work of the steps since it was read last.

    Args:
        sizes: of the whole model.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes) -> None:
        self._sizes = sizes
        self._samples = recipe.train.global_batch_size
        self._trained = trained_shares(sizes, recipe)
        self._stage = recipe.stage.asking(sizes.guidance_embeds)
        self._forwards = self._stage.forwards()
        device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._peaks = peaks(recipe, device_name)
        self._steps: dict[Tokens, Work] = {}  # by bucket
        self._work, self._seconds = Work(), 0.0

    def add(self, batch: Batch, seconds: float) -> None:
        """Counts one step, of whose samples this rank has `batch`."""
        tokens = Tokens(image_tokens(self._sizes, batch.latent_shape[1:]), batch.text_length)
        if tokens not in self._steps:
            answers = round(self._samples * self._forwards.answers)
            points = self._samples * self._forwards.points
            forward = forward_work(self._sizes, tokens)
            self._steps[tokens] = step_work(forward, answers, points, self._trained)
        self._work += self._steps[tokens]
        self._seconds += seconds

    def drew(self, latent_size: tuple[int, int], text_length: int, samples: int, seconds: float) -> None:
        """Counts a collection of so many samples, over all ranks."""
        assert isinstance(self._stage, CollectingConfig)
        forward = forward_work(self._sizes, Tokens(image_tokens(self._sizes, latent_size), text_length))
        self._work += samples * self._stage.sampling_forwards() * forward
        self._seconds += seconds

    def take(self) -> dict[str, float]:
        """tflops-per-gpu and mfu, the latter where the peak is known; without a GPU tflops-per-process alone."""
        work, seconds, self._work, self._seconds = self._work, self._seconds, Work(), 0.0
        seconds *= dist.get_world_size()
        reached = work.total / seconds / 1e12
        if not torch.cuda.is_available():
            return {"tflops-per-process": reached}
        found = {"tflops-per-gpu": reached}
        if self._peaks is not None:
            found["mfu"] = least_seconds(work, *self._peaks) / seconds
        return found


def least_seconds(work: Work, token_linears: float, others: float) -> float:
    """What work takes one GPU at its peaks in TFLOP/s: of linears over tokens (the part for FP8), and of the rest."""
    return (work.token_linears / token_linears + (work.total - work.token_linears) / others) / 1e12


def peaks(recipe: Recipe, device_name: str) -> tuple[float, float] | None:
    """TFLOP/s of a GPU for linears over tokens and for the rest, at the recipe's precisions; None where unknown.

    Layers that model.first_last_layers_bf16 excepts from FP8 are not told apart.
    """
    override = recipe.logging.peak_tflops
    if override is not None:
        return override, override
    model = recipe.model
    token_linears = peak_tflops(device_name, "fp8" if model.fp8 else model.dtype)
    others = peak_tflops(device_name, model.dtype)
    return None if token_linears is None or others is None else (token_linears, others)
