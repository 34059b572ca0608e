"""What a setting may be: a test of its value, and the words for it."""

from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]  # what holds, and how to say so


def one_of(*names: str) -> Rule:
    return (lambda value: value in names), "one of " + ", ".join(names)


def at_least(low: float) -> Rule:
    return (lambda value: value >= low), f"at least {low}"


def above(low: float) -> Rule:
    return (lambda value: value > low), f"above {low}"


def within(low: float, high: float) -> Rule:
    return (lambda value: low <= value <= high), f"between {low} and {high}"


def from_below(low: float, high: float) -> Rule:
    return (lambda value: low <= value < high), f"at least {low} and below {high}"
