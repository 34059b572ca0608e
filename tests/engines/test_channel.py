"""Answers on their way from the last stage to the first: nobody waits without need, and nothing is left behind."""

import pytest
import torch
from engine_cases import VPP2, iterate, make_batch, make_recipe, start_engine
from multirank import run_ranks

from soar_mega.config import StageConfig
from soar_mega.distributed import is_first_stage
from soar_mega.engines.channel import Answers
from soar_mega.stages import make_stage


def order_of_events(recipe):
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    events = []
    wait, forward = engine._channel.wait, engine._pipeline.forward

    def noted_wait(i):
        events.append(f"wait {i}")
        return wait(i)

    def noted_forward(chunk, *arguments):
        if chunk.module.pre_process or chunk.module.post_process:
            events.append("forward")
        return forward(chunk, *arguments)

    batch = make_batch(0)
    answers = engine.answer(stage.queries, batch)
    engine._channel.wait, engine._pipeline.forward = noted_wait, noted_forward
    engine.learn(stage.points, stage.loss, batch, answers)
    return events, answers._kept, engine._channel._sent, engine._channel._posted


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_first_stage_waits_for_an_answer_just_before_it_needs_it(chunks):
    recipe = make_recipe((1, 2), virtual_pipeline_model_parallel_size=chunks)
    first, last = run_ranks(order_of_events, 2, recipe)
    events = first[0]
    # base points (eight, three at a time) come first; the third micro-batch holds the first auxiliary point
    assert events[:4] == ["forward", "forward", "wait 0", "forward"]
    assert [e for e in events if e != "forward"] == [f"wait {i}" for i in range(4)]
    assert events.count("forward") == last[0].count("forward") == len(last[0]) == 14
    assert not any(first[1:]) and not any(last[1:])


def answers_nobody_asked_for(recipe):
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    plain = make_stage(StageConfig(name="sft"), shift=1.0)
    batch = make_batch(0, invalid=None)
    engine.answer(stage.queries, batch)
    answers = engine.answer(stage.queries, batch)
    engine.learn(plain.points, plain.loss, batch, answers)  # these points need no answer
    answers = engine.answer(stage.queries, batch)
    latest = answers.get(2) if is_first_stage() else answers._kept[2]  # out of order
    found = engine.velocity(batch.latents, torch.full((8,), 0.5), batch.text, batch.pooled)
    return latest, found, iterate(engine, stage, make_batch(1))[0]["loss"]


@pytest.mark.parametrize("settings", [{}, VPP2], ids=["one-chunk", "two-chunks"])
def test_answers_that_nobody_asks_for_do_no_harm(settings):
    alone = make_recipe(train=settings.get("train"))
    [(one, expected, loss)] = run_ranks(answers_nobody_asked_for, 1, alone)
    (first, found, first_loss), (last, too, last_loss) = run_ranks(
        answers_nobody_asked_for, 2, make_recipe((1, 2), **settings)
    )
    assert first.equal(last) and found.equal(too)
    torch.testing.assert_close(first, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert first_loss == last_loss == pytest.approx(loss, rel=1e-5)


def test_velocities_are_taken_by_sample_and_only_where_wanted():
    answers = Answers(2, True, None)
    for i in range(2):
        cond = torch.arange(2.0) + 2 * i
        answers.put(i, torch.cat([cond, cond + 100])[:, None, None, None])
    sample, wanted = torch.tensor([3, 0, 2]), torch.tensor([True, False, True])
    v_uncond, v_cond = answers.velocities(sample, wanted)
    assert v_cond.flatten().tolist() == [3, 0, 2] and v_uncond.flatten().tolist() == [103, 0, 102]
    assert answers.velocities(sample, torch.zeros(3, dtype=torch.bool)) == (None, None)
