"""What a team reads when a run ends because ranks died, stopped or hang: one message, from what all ranks said last."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from soar_mega.faults.roll_call import State

NAMED = 8  # ranks that are told of one by one


def failure_report(why: str, states: Sequence[State], silences: Mapping[int, float]) -> str:
    """The message: what was noticed, which ranks are to blame, and where the others are.

    Args:
        states: of all ranks, where the store still has them; those that do not answer were stopped or are gone.
        silences: for at least how many seconds a rank has said nothing.
    """
    silent = [state for state in states if not state.answers]
    living = [state for state in states if state.answers]
    blamed = [] if silent else behind(living)
    lines = [f"the run ends: {why}"]
    if not states:
        lines.append(
            "the store of the run does not answer: rank 0, or torchrun's agent which keeps it, is gone"
        )
    lines += [f"{_who(s)} {_last_seen(s, silences.get(s.rank, 0.0))}" for s in silent[:NAMED]]
    waited = "; the others wait for it" if len(living) > len(blamed) else ""
    lines += [f"{_who(s)} is in {_where(s)} for {s.seconds:.0f} s{waited}" for s in blamed[:NAMED]]
    more = len(silent) + len(blamed) - NAMED
    if more > 0:
        lines.append(f"and {more} more ranks like them")
    if living and not silent and not blamed:
        lines.append("no rank is behind the others, and none looks as if the others wait for it:")
    others = sorted((s for s in living if s not in blamed), key=lambda s: (_where(s), s.rank))
    for where, group in groupby(others, key=_where):
        lines.append(f"{_ranks(s.rank for s in group)} in {where}")
    return "\n  ".join(lines)


def behind(living: Sequence[State]) -> list[State]:
    """The ranks that the others wait for: in an earlier phase, or alone with something else than waiting."""
    if len(living) == 1:
        return list(living)
    first = min((s.number for s in living), default=0)
    for blamed in ([s for s in living if s.number == first], [s for s in living if not s.waits]):
        if 0 < len(blamed) < len(living):
            return blamed
    return []


def _who(state: State) -> str:
    return f"rank {state.rank} (process {state.pid} on {state.host})"


def _where(state: State) -> str:
    place = f", at {state.place}" if state.place else ""
    return f"step {state.step}, phase {state.phase}{place}"


def _last_seen(state: State, silence: float) -> str:
    return (
        "gives no sign of life: killed (out of memory?), stopped, its node lost, or native code keeps Python from "
        f"running. Last seen at least {silence:.0f} s ago in {_where(state)}"
    )


def _ranks(numbers: Iterable[int]) -> str:
    """As in: ranks 0-3, 5."""
    ordered = sorted(numbers)
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])]
    told = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' if len(ordered) > 1 else ''} {told}"
