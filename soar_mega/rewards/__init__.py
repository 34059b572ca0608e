"""What samples are worth to a method that learns from them: scorers by name and weight."""

from soar_mega.rewards.combined import Rewards
from soar_mega.rewards.registry import make_rewards, make_scorer

__all__ = ["Rewards", "make_rewards", "make_scorer"]
