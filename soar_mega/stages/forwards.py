"""How many forwards a training method takes, asked of the stage itself."""

from typing import NamedTuple

import torch

from soar_mega.data.batch import Batch
from soar_mega.stages.points import Stage


class Forwards(NamedTuple):
    """Forwards of a sample: without a gradient, and with a backward."""

    answers: int
    points: int


def forwards_per_sample(stage: Stage) -> Forwards:
    """Absent points are counted like the others: they are computed, with a weight of zero."""
    one = Batch(
        seed=0,
        position=torch.zeros(1, dtype=torch.int64),
        valid=torch.ones(1, dtype=torch.bool),
        latent_shape=(1, 1, 1),
        text_length=1,
    )
    queries = stage.queries(one)
    answers = 0 if queries is None else 2 if queries.unconditional else 1
    return Forwards(answers, len(stage.points(one)))
