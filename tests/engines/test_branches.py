"""Who is asked in which forward, and rollouts of several steps whose samples do not all need both branches."""

from dataclasses import replace

import pytest
import torch
from engine_cases import SOAR, VPP2, assert_training_agrees, make_batch, make_recipe, start_engine, train_case
from multirank import run_ranks

from soar_mega.engines.branches import branches_of
from soar_mega.engines.channel import Answers
from soar_mega.flow import normal
from soar_mega.models.common.conditions import Conditions
from soar_mega.stages import make_stage
from soar_mega.stages.points import Queries

VARIED = replace(
    SOAR,
    num_rollout_paths=1,
    guidance_scale={"1": 0.5, "3": 0.5},
    rollout_steps=2,
    max_rollout_length=0.8,
    auxiliary_gamma=0.4,
)


def queries_of(total, unconditional):
    nothing = torch.zeros(total, dtype=torch.float64)
    return Queries(
        sample=torch.arange(total),
        path=torch.zeros(total, dtype=torch.int64),
        timestep=nothing,
        rows=torch.zeros(total, 6, dtype=torch.float64),
        dropped=nothing > 0,
        unconditional=unconditional,
    )


@pytest.mark.parametrize("total", [1, 2, 7, 16])
@pytest.mark.parametrize("most", [1, 2, 5, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0, True, False])
def test_each_query_is_answered_by_the_branches_that_it_wants(total, most, share, monkeypatch):
    # what memory holds that nobody has written may be no number
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.full(size, torch.nan, device=device))
    wanted = share
    if not isinstance(share, bool):
        wanted = normal(1, "wanted", torch.arange(total), 0, (1,))[:, 0].argsort().argsort() < share * total
    branches = branches_of(queries_of(total, wanted), most)
    answers = Answers(branches, (1, 1, 1), None)
    for i in range(branches.count):
        said = branches.query[i] + 100 * branches.unconditional[i]
        answers.put(i, said.float()[:, None, None, None])
    every = torch.arange(total)
    rows = answers.rows_of(every, torch.ones(total, dtype=torch.bool))
    (read,) = answers.read_by([every], [every >= 0])
    v_uncond, v_cond = answers.velocities(read)
    assert v_cond[rows].flatten().tolist() == every.tolist()
    both = torch.as_tensor(wanted).expand(total)
    if share is False:
        assert v_uncond is None and branches.rows == min(most, total)
    else:
        found = v_uncond[rows].flatten()
        assert torch.equal(found[both], 100.0 + every[both]) and bool(found.isfinite().all())
    nobody = answers.rows_of(every, torch.zeros(total, dtype=torch.bool))
    assert bool((v_cond[nobody] == 0).all())
    if not isinstance(share, bool):  # nearly as few rows as there are questions
        assert branches.query.numel() <= total + int(both.sum()) + 3 * branches.size
        assert branches.rows == 2 * min(most, -(-total // 4))  # whatever the draws are


def rollouts(recipe):
    """The guided mean velocity of each sample's rollout, by forwards of states made here, and as the engine has it."""
    engine, stage, batch = (
        start_engine(recipe),
        make_stage(recipe.stage, shift=1.0),
        make_batch(0, invalid=None),
    )
    queries, span = stage.queries(batch), stage._rollout_span(batch)
    z1 = normal(batch.seed, "noise", batch.position, 0, batch.latent_shape)
    nothing = batch.empty_text.expand_as(batch.text), batch.empty_pooled.expand_as(batch.pooled)
    drop = queries.dropped
    text = torch.where(drop[:, None, None], nothing[0], batch.text)
    pooled = torch.where(drop[:, None], nothing[1], batch.pooled)

    def wide(values):
        return values.float()[:, None, None, None]

    sigmas = [span.sigma0, *(step.timestep / 1000 for step in queries.then), span.sigma1]
    start = (1 - wide(sigmas[0])) * batch.latents + wide(sigmas[0]) * z1
    z, scale = start, wide(stage._guidance(batch))
    for here, end in zip(sigmas, sigmas[1:], strict=False):
        cond = engine.velocity(z, here, Conditions(text, pooled))
        uncond = engine.velocity(z, here, Conditions(*nothing))
        z = z + wide(end - here) * (uncond + scale * (cond - uncond))

    answers = engine.answer(stage.queries, batch)
    read = list(range(answers.count))
    rows = answers.rows_of(torch.arange(len(batch)), torch.ones(len(batch), dtype=torch.bool))
    v_uncond, v_cond = (each[rows] for each in answers.velocities(read))
    unread = wide(stage._guidance(batch)) == 1
    v = torch.where(unread, v_cond, v_uncond + scale * (v_cond - v_uncond))
    answers.close()
    return z, start + wide(span.sigma1 - sigmas[0]) * v, answers.branches.query.numel()


def test_rollouts_of_several_steps_go_where_the_model_leads():
    recipe = make_recipe(stage=replace(VARIED, rollout_steps=3))
    [(expected, found, rows)] = run_ranks(rollouts, 1, recipe)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == 12  # of 8 samples, half of which ask twice


@pytest.mark.parametrize(
    "processes, settings",
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"layout": (1, 2)}, marks=pytest.mark.slow),
        (2, {"layout": (1, 2), "overlap_rollout": True}),
        pytest.param(2, {"layout": (1, 2), **VPP2}, marks=pytest.mark.slow),
        pytest.param(2, {"engine": "deepspeed", "zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param(4, {"layout": (2, 2), "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["dp2", "batched", "overlapped", "two-chunks", "zero3", "tp2-pp2"],
)
def test_mixed_and_longer_rollouts_do_not_depend_on_the_layout(processes, settings):
    [expected] = run_ranks(train_case, 1, make_recipe(stage=VARIED), 2)
    for found in run_ranks(train_case, processes, make_recipe(stage=VARIED, **settings), 2):
        assert_training_agrees(found, expected)
