"""From spans to numbers: where the time of a step went, and how long pipeline ranks stood still."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from step_profile.recorder import Span

Json = dict[str, Any]

ORDER = ("agreement", "data", "answer", "learn", "optimizer", "checkpoint")
WORKING = ("forward", "backward")


def by_phase(spans: Sequence[Span], steps: int) -> Json:
    """Seconds per step of each phase and of what is marked in it, each without what is marked within it.

    "host" is the time on the clock, "process" the processor time of all threads, "device" the time between the GPU's
    arrivals at both ends, where there is one. Host seconds add up to the step's.
    """
    found: Json = {}
    inner: dict[int, list[Span]] = {}  # by depth: ended, and in no ended span yet
    for span in spans:  # in the order of their ends: what is within comes first
        children = inner.pop(span.depth + 1, [])
        inner.setdefault(span.depth, []).append(span)
        own = {
            "host": _length(span, "start", "end") - sum(_length(c, "start", "end") for c in children),
            "process": _length(span, "process_start", "process_end")
            - sum(_length(c, "process_start", "process_end") for c in children),
        }
        if span.device_end is not None:
            within = sum(_length(c, "device_start", "device_end") for c in children)
            own["device"] = _length(span, "device_start", "device_end") - within
        name = span.name if span.depth == 0 else f"{span.phase}/{span.name}"
        so_far = found.setdefault(name, dict.fromkeys(own, 0.0) | {"calls": 0})
        for clock, seconds in own.items():
            so_far[clock] += seconds / steps
        so_far["calls"] += 1 / steps
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _length(span: Span, start: str, end: str) -> float:
    return float(getattr(span, end) - getattr(span, start))


def _place(name: str) -> tuple[int, str]:
    phase = name.partition("/")[0]
    return (ORDER.index(phase) if phase in ORDER else len(ORDER), name)


def bubble(
    ranks: Iterable[Sequence[Span]], phase: str, micro_batches: int, chunks: int, is_on_gpu: bool = False
) -> Json:
    """The share of time that the pipeline ranks of one pipeline neither computed forwards nor backwards in.

    From the first beginning to the last end on any of them, against the ideal (PP - 1) / (V m + PP - 1), which is that
    of equal stages and messages that take no time.

    Args:
        ranks: the spans of one step, by pipeline rank.
        micro_batches: m; chunks: V, model chunks per rank.
    """
    start, end = ("device_start", "device_end") if is_on_gpu else ("start", "end")
    work = [[s for s in spans if s.phase == phase and s.name in WORKING] for spans in ranks]
    first = min(getattr(s, start) for spans in work for s in spans)
    last = max(getattr(s, end) for spans in work for s in spans)
    busy = [sum(_length(s, start, end) for s in spans) for spans in work]
    others = len(work) - 1
    return {
        "micro_batches": micro_batches,
        "seconds": last - first,
        "busy_seconds": busy,
        "measured": 1.0 - sum(busy) / (len(work) * (last - first)),
        "ideal": others / (chunks * micro_batches + others),
    }


def chrome_trace(spans: Mapping[int, Sequence[Span]]) -> Json:
    """For chrome://tracing or ui.perfetto.dev: a process for each rank, with a row of the host and one of the GPU."""
    events: list[Json] = []
    for rank, mine in spans.items():
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for row, start, end in (("host", "start", "end"), ("device", "device_start", "device_end")):
            for span in mine:
                if getattr(span, start) is not None:
                    events.append(
                        {
                            "ph": "X",
                            "name": span.name,
                            "cat": span.phase,
                            "pid": rank,
                            "tid": row,
                            "ts": 1e6 * getattr(span, start),
                            "dur": 1e6 * _length(span, start, end),
                        }
                    )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
