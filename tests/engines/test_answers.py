"""Answers by several weights alive at a time, at any points of a batch, and what a loss reads of them."""

from dataclasses import replace

import pytest
import torch
from engine_cases import VPP2, make_batch, make_recipe, random_tensor, start_engine
from multirank import run_ranks

from soar_mega.flow import normal
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.names import global_parameter_names
from soar_mega.stages import make_stage
from soar_mega.stages.points import Queries

SAMPLE = torch.tensor([5, 0, 0, 7, 2, 6, 6, 1, 4, 2, 5])  # not one query per sample, and in no order
PATH = torch.tensor([0, 0, 1, 3, 2, 0, 1, 0, 0, 0, 1])
SIGMA = torch.linspace(0.05, 1.0, len(SAMPLE), dtype=torch.float64)


def queries(batch):
    """On the ray, with the noise of a path on top."""
    zero = torch.zeros_like(SIGMA)
    rows = torch.stack([1 - SIGMA, SIGMA, zero, zero, zero + 0.3, zero], dim=1)
    dropped = torch.zeros(len(SAMPLE), dtype=torch.bool)
    return Queries(
        sample=SAMPLE,
        path=PATH,
        timestep=1000 * SIGMA,
        rows=rows,
        dropped=dropped,
        unconditional=True,
    )


def two_kinds_of_weights(recipe):
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    engine.keep_weights("reference")
    shapes = global_parameter_names(engine.layout)
    engine.load_weights({"model": {name: 1.2 * random_tensor(name, p) for name, p in shapes.items()}})
    return engine, stage, make_batch(0, invalid=None)


def said_by_the_model():
    """The conditional velocities [Q, C, H, W] of each kind of weights, by forwards of states made here."""
    engine, _, batch = two_kinds_of_weights(make_recipe())
    z1 = normal(batch.seed, "noise", batch.position[SAMPLE], 0, batch.latent_shape)
    eps = normal(batch.seed, "rollout", batch.position[SAMPLE], PATH, batch.latent_shape)
    s = SIGMA.float()[:, None, None, None]
    states = (1 - s) * batch.latents[SAMPLE] + s * z1 + 0.3 * eps
    text, pooled = batch.text[SAMPLE], batch.pooled[SAMPLE]
    nothing = batch.empty_text.expand_as(text), batch.empty_pooled.expand_as(pooled)
    return [
        [
            engine.velocity(states, SIGMA, Conditions(*conditions), weights)
            for conditions in ((text, pooled), nothing)
        ]
        for weights in ("current", "reference")
    ]


def read_in_turn(recipe):
    """What a loss reads of two handles beside the one of the rows, and how long they live."""
    engine, stage, batch = two_kinds_of_weights(recipe)
    answers = engine.answer(stage.queries, batch)
    plain = dict(engine.learn(stage.points, stage.loss, batch, answers))

    reference = engine.answer(queries, batch, weights="reference")
    answers = engine.answer(stage.queries, batch)
    unread = engine.answer(queries, batch)
    now = engine.answer(queries, batch)
    handles = {"rows": answers, "reference": reference, "now": now}
    seen, alive = [], []

    def points(batch):
        made = stage.points(batch)
        place = torch.arange(len(made)) % len(SAMPLE)
        return replace(made, reads={"reference": place, "now": place.flip(0)})

    def loss(points, velocity):
        seen.append([each for name in ("now", "reference") for each in points.answered[name]])
        alive.append([handle._all is not None for handle in handles.values()])
        return stage.loss(points, velocity)

    statistics = dict(engine.learn(points, loss, batch, answers, reference=reference, now=now))
    left = [handle._all for handle in handles.values()]
    first = unread.get(1).clone() if unread._all is not None else None
    unread.close()
    unread.close()
    count = len(engine.learned[0])
    found = [torch.cat(parts)[:count] for parts in zip(*seen, strict=True)] if seen else None
    return found, engine.learned[0].reads, alive, left, first, statistics == plain


@pytest.fixture(scope="module")
def expected():
    [found] = run_ranks(said_by_the_model, 1)
    return found


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        pytest.param(2, {"layout": (1, 2)}, marks=pytest.mark.slow),
        (2, {"layout": (1, 2), "overlap_rollout": True}),
        pytest.param(2, {"layout": (1, 2)} | VPP2, marks=pytest.mark.slow),
        pytest.param(2, {"layout": (2, 1), "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["one", "batched", "overlapped", "two-chunks", "tensor-parallel"],
)
def test_handles_by_different_weights_live_side_by_side(expected, ranks, settings):
    results = run_ranks(read_in_turn, ranks, make_recipe(**settings))
    pipeline = settings.get("layout", (1, 1))[1]
    for rank, (found, reads, alive, left, first, is_same) in enumerate(results):
        is_first, is_last = pipeline == 1 or rank == 0, pipeline == 1 or rank == 1
        assert left == [None, None, None]  # all are closed behind the step
        assert is_same  # to the last bit: other handles change nothing
        if is_last:
            (now, reference) = expected
            wanted = [now[1][reads["now"]], now[0][reads["now"]]]
            wanted += [reference[1][reads["reference"]], reference[0][reads["reference"]]]
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert all(alive[0]) and not any(alive[-1])  # freed behind their last point, inside the step
        if is_first or is_last:
            size = len(first) // 2
            torch.testing.assert_close(first[:size], expected[0][0][size : 2 * size], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0][0], expected[1][0], atol=1e-2)
