"""Answers on their way from the last stage to the first: nobody waits without need, and nothing is left behind."""

import functools

import nccl_rules
import pytest
import torch
from engine_cases import VPP2, iterate, make_batch, make_recipe, start_engine
from multirank import RankFailure, run_ranks
from test_branches import queries_of

from soar_mega.distributed import is_first_stage
from soar_mega.engines import channel
from soar_mega.engines.branches import branches_of
from soar_mega.engines.channel import Answers, Messages, OverlappedChannel
from soar_mega.models.common.conditions import Conditions
from soar_mega.stages import SftConfig, make_stage

ANSWERS = (1, 4, 8, 33)


def order_of_events(recipe):
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    events = []
    move, wait, forward = Messages.move, Messages.wait, engine._pipeline.forward

    def noted_move(self, until):
        events.append(f"message until {until}")
        move(self, until)

    def noted_wait(self, i):
        events.append(f"wait {i}")
        return wait(self, i)

    def noted_forward(chunk, *arguments):
        if chunk.module.pre_process or chunk.module.post_process:
            events.append("forward")
        return forward(chunk, *arguments)

    batch = make_batch(0)
    Messages.move, Messages.wait, engine._pipeline.forward = noted_move, noted_wait, noted_forward
    answers = engine.answer(stage.queries, batch)
    messages = answers._messages
    during, events[:] = list(events), []
    engine.learn(stage.points, stage.loss, batch, answers)
    return during, events, answers._ready, answers._all is not None, messages._works


@pytest.mark.parametrize(
    "settings",
    [{}, {"overlap_rollout": True}, {"virtual_pipeline_model_parallel_size": 2}],
    ids=["batched", "overlapped", "two-chunks"],
)
def test_an_answer_is_waited_for_just_before_it_is_needed(settings):
    for _, events, *left in run_ranks(order_of_events, 2, make_recipe((1, 2), **settings)):
        # base points (eight, three at a time) come first; the third micro-batch holds the first auxiliary point
        assert events[:4] == ["forward", "forward", "wait 0", "forward"]
        assert [e for e in events if e != "forward"] == [f"wait {i}" for i in range(4)]
        assert events.count("forward") == 14
        assert not any(left)


def test_overlapped_answers_travel_while_the_pass_goes_on():
    recipe = make_recipe((1, 2), train={"micro_batch_size": 1}, overlap_rollout=True)
    first, last = (ranks[0] for ranks in run_ranks(order_of_events, 2, recipe))
    # eight answers, four in a message; nothing is left for the last rank to start at the end
    during = [*["forward"] * 4, "message until 4", *["forward"] * 4, "message until 8"]
    assert first == during and last == [*during, "message until 8"]


def answers_nobody_asked_for(recipe):
    engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
    plain = make_stage(SftConfig(), shift=1.0)
    batch = make_batch(0, invalid=None)
    engine.answer(stage.queries, batch)
    answers = engine.answer(stage.queries, batch)
    engine.learn(plain.points, plain.loss, batch, answers)  # these points need no answer
    answers = engine.answer(stage.queries, batch)
    latest = answers.get(2).clone()  # out of order
    answers.close()
    answers.close()
    found = engine.velocity(batch.latents, torch.full((8,), 0.5), Conditions(batch.text, batch.pooled))
    return latest, found, iterate(engine, stage, make_batch(1))[0]["loss"]


@pytest.mark.parametrize(
    "settings", [{}, {"overlap_rollout": True}, VPP2], ids=["batched", "overlapped", "two-chunks"]
)
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
    answers = Answers(branches_of(queries_of(4, True), 2), (1, 1, 1), None)
    for i in range(2):
        cond = torch.arange(2.0) + 2 * i
        answers.put(i, torch.cat([cond, cond + 100])[:, None, None, None])
    sample, wanted = torch.tensor([3, 0, 2, 1]), torch.tensor([True, False, True, True])
    assert answers.read_by(sample.split(2), wanted.split(2)) == [[1], [0, 1]]
    rows = answers.rows_of(sample, wanted)
    v_uncond, v_cond = answers.velocities([0, 1])
    assert v_cond[rows].flatten().tolist() == [3, 0, 2, 1]
    assert v_uncond[rows].flatten().tolist() == [103, 0, 102, 101]
    assert answers.velocities([]) == (None, None)


def steps_under_rules(pipeline, settings, answers, rules=None, old=False):
    """The loss of a step with each number of answers, for each of the settings, after it the gradient norm."""
    if rules is not None:
        nccl_rules.emulate(rules, patience=2.5 if old and rules else 90.0)
    if old:
        channel.OverlappedChannel = EarlyReceives
    losses = {}
    for name, setting in settings.items():
        train = {"micro_batch_size": 1, "points_per_micro_batch": 15}
        recipe = make_recipe((1, pipeline), train=train, **setting)
        engine, stage = start_engine(recipe), make_stage(recipe.stage, shift=1.0)
        engine.model.config.batch_p2p_sync = old
        for count in answers:
            statistics, result = iterate(engine, stage, make_batch(count, count, invalid=None))
            losses[name, count] = statistics["loss"], result.grad_norm
    return losses


class EarlyReceives(OverlappedChannel):
    """What works on gloo: the first rank posts receives before the pass, as the first thing on their communicator."""

    def _warm_up(self):
        pass

    def open(self, count, answers):
        messages = EarlyMessages(self, count, answers)
        messages.post(4)
        return messages

    def send(self, messages, i):
        messages.move(i + 1)

    def advance(self, messages, forwards):
        pass

    def end_pass(self, messages):
        pass


class EarlyMessages(Messages):
    def wait(self, i):
        self.post(i + 5)
        return super().wait(i)

    def close(self):
        self.post(self.count)
        super().close()

    def post(self, until):
        while is_first_stage() and self.moved < min(until, self.count):
            self.move(self.moved + 1)


@functools.cache
def expected_losses():
    [losses] = run_ranks(steps_under_rules, 1, 1, {"alone": {}}, ANSWERS)
    return losses


@pytest.mark.parametrize("pipeline", [2, 4])
def test_both_channels_keep_to_the_rules_of_nccl(pipeline):
    settings = {"batched": {}, "overlapped": {"overlap_rollout": True}}
    ranks = run_ranks(steps_under_rules, pipeline, pipeline, settings, ANSWERS, nccl_rules.RULES)
    for losses in ranks:
        for (name, count), found in losses.items():
            assert found == pytest.approx(expected_losses()["alone", count], rel=1e-5), (
                f"{name}, {count} answers"
            )


@pytest.mark.parametrize("rule", nccl_rules.RULES)
def test_each_rule_stops_receives_that_are_posted_before_the_pass(rule):
    with pytest.raises(RankFailure, match="Hang: rank . waits for"):
        run_ranks(steps_under_rules, 2, 2, {"early": {"overlap_rollout": True}}, (8,), (rule,), True)


def test_without_these_rules_early_receives_pass():
    found, _ = run_ranks(steps_under_rules, 2, 2, {"early": {"overlap_rollout": True}}, ANSWERS, (), True)
    for count in ANSWERS:
        assert found["early", count] == pytest.approx(expected_losses()["alone", count], rel=1e-5)
