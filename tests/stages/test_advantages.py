"""Advantages against the published trainers' formulas, and rewards that are missing or equal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rl_trainers import TRAINERS, advantages_of, mix_grpo_advantages

from soar_mega.evaluation.scorer import TOTAL
from soar_mega.stages import FlowGrpoConfig
from soar_mega.stages.advantages import advantages, advantages_of_all, groups
from soar_mega.stages.published import PUBLISHED

REWARDS = torch.from_numpy(np.random.default_rng(3).normal(0.4, 0.2, 35))
PROMPT = torch.arange(35) % 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_advantages_are_the_trainers(name):
    ours = advantages(REWARDS, PROMPT, PUBLISHED[name].stage)
    theirs = advantages_of(REWARDS.numpy(), PROMPT.tolist(), TRAINERS[name].std_of)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-12, atol=1e-13)


def test_each_reward_may_have_advantages_of_its_own():
    """As in MixGRPO. A sample that one of them could not judge counts for none; a reward of weight 0 for nothing."""
    others = REWARDS.flip(0).square() * 30
    config = replace(PUBLISHED["mix_grpo"].stage, rewards={"a": 0.2, "b": 0.8, "c": 0.0})
    rewards = {"a": REWARDS, "b": others, "c": others.sqrt(), TOTAL: 0.2 * REWARDS + 0.8 * others}
    found = advantages_of_all(rewards, PROMPT, config)
    theirs = mix_grpo_advantages([REWARDS.numpy(), others.numpy()], [1.0, 4.0], PROMPT.tolist())
    torch.testing.assert_close(found, torch.from_numpy(theirs), rtol=1e-12, atol=1e-13)
    of_total = advantages(rewards[TOTAL], PROMPT, config)
    assert not torch.allclose(found, of_total, atol=0.1)
    assert torch.equal(advantages_of_all(rewards, PROMPT, replace(config, advantages_of="total")), of_total)
    unknown = rewards | {"c": torch.full_like(others, torch.nan)}
    assert torch.equal(advantages_of_all(unknown, PROMPT, config), found)

    known = torch.arange(35) != 6
    missing = rewards | {name: rewards[name].masked_fill(~known, torch.nan) for name in ("b", TOTAL)}
    found = advantages_of_all(missing, PROMPT, config)
    rest = advantages_of_all({name: values[known] for name, values in rewards.items()}, PROMPT[known], config)
    assert torch.equal(found.isnan(), ~known)
    torch.testing.assert_close(found[known], rest, rtol=1e-12, atol=1e-13)


def test_root_of_variance_and_epsilon_as_in_unirl_per_prompt():
    config = FlowGrpoConfig(std_over="prompt", std_epsilon=1e-3, std_epsilon_use="in_root")
    theirs = advantages_of(
        REWARDS.numpy(), PROMPT.tolist(), lambda everything, group: np.sqrt(np.var(group) + 1e-3)
    )
    torch.testing.assert_close(
        advantages(REWARDS, PROMPT, config), torch.from_numpy(theirs), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("std_over", ["collection", "prompt"])
@pytest.mark.parametrize("epsilon_use", ["added", "in_root", "floor"])
def test_equal_rewards_have_no_advantage_at_all(std_over, epsilon_use):
    rewards = REWARDS.clone()
    rewards[PROMPT == 2] = 0.1  # whose mean, summed up, is another number
    assert rewards[PROMPT == 2].sum() / 7 != 0.1
    for epsilon in (1e-4, 0.0):
        config = FlowGrpoConfig(std_over=std_over, std_epsilon=epsilon, std_epsilon_use=epsilon_use)
        found = advantages(rewards, PROMPT, config)
        assert torch.equal(found == 0, PROMPT == 2) and bool(found.isfinite().all())


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("std_over", ["collection", "prompt"])
def test_samples_that_were_not_judged_count_nowhere(std_over, unbiased):
    rewards = REWARDS.clone()
    missing = torch.tensor([0, 3, 4, 9, 14, 19, 24, 29, 34])  # all of prompt 4
    rewards[missing] = torch.nan
    config = FlowGrpoConfig(std_over=std_over, std_unbiased=unbiased)
    known = ~rewards.isnan()
    expected = torch.full_like(rewards, torch.nan)
    expected[known] = advantages(rewards[known], PROMPT[known], config)
    assert torch.equal(known, ~advantages(rewards, PROMPT, config).isnan())
    torch.testing.assert_close(
        advantages(rewards, PROMPT, config), expected, rtol=1e-12, atol=0, equal_nan=True
    )


def test_a_prompt_with_one_sample_has_no_advantage():
    prompt = torch.tensor([0, 0, 0, 1])
    config = FlowGrpoConfig(std_over="prompt", std_unbiased=True)
    found = advantages(torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64), prompt, config)
    assert found[3] == 0 and bool(found.isfinite().all())


def test_groups_tell_of_their_rewards():
    rewards = torch.tensor([1.0, 5.0, 3.0, 5.0, torch.nan, torch.nan], dtype=torch.float64)
    found = groups(rewards, torch.tensor([7, 4, 7, 4, 7, 9]))
    assert found.index.tolist() == [1, 0, 1, 0, 1, 2] and bool(found.mean[2].isnan())
    assert found.mean[:2].tolist() == [5.0, 2.0] and found.spread[:2].tolist() == [0.0, 1.0]
    unbiased = groups(rewards, torch.tensor([7, 4, 7, 4, 7, 9]), unbiased=True)
    assert unbiased.spread[:2].square().tolist() == pytest.approx([0.0, 2.0])
