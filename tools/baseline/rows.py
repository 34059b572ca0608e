"""The rows of a comparison: which arms, and the sizes of a forward that each is tried at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from baseline.case import Case
from baseline.our_arm import OurArm
from baseline.published_arm import PublishedArm, procedure_of
from baseline.worker import Arm

from soar_mega.models.common.micro_batches import LIGHT

REPAIRED = {"rollout_graph": False, "hold_graphs": False, "separate_points": False}


@dataclass(frozen=True)
class Row:
    """One line of the table. `arms`: by micro-batch, how the arm is built; the fastest is what the line shows."""

    name: str
    arms: dict[int, tuple[Callable[..., Arm], tuple[Any, ...]]]
    in_fp8: bool = False  # its linears over tokens

    def at(self, size: int) -> "Row":
        """With one size alone."""
        return replace(self, arms={size: self.arms[size]})


def published(case: Case, name: str, sizes: Sequence[int], online: bool = False, **habits: bool) -> Row:
    """The published procedure with habits repaired; sizes in samples."""
    procedure = procedure_of(case, **habits)
    return Row(name, {size: (PublishedArm, (case, procedure, size, online)) for size in sizes})


def ours(case: Case, name: str, sizes: Sequence[int], cuda_graphs: str = "none", **model: Any) -> Row:
    """soar_mega with these settings of the model; sizes in points."""
    arms = {}
    for points in sizes:
        # of a guided forward, which has two rows for each
        samples = min(max(1, points // 2), case.batch_size)
        arms[points] = (OurArm, (case, samples, points, cuda_graphs, model))
    return Row(name, arms, in_fp8="fp8" in model)


def rows_in_turns(case: Case, sizes: Sequence[int], fastest: Callable[[Row], Row]) -> list[Row]:
    """All rows at one micro-batch each: the one that is fastest for the published procedure, for its repair, and for
    ours.

    The single habits are measured at the published procedure's own size, where nothing else changes.
    """
    best = fastest(published(case, "published procedure", sizes))
    (micro,) = best.arms
    rows = [
        best,
        published(case, "  rollout without a graph", [micro], rollout_graph=False),
        published(case, "  one backward per point, no held graphs", [micro], hold_graphs=False),
        published(case, "  auxiliary points in one forward", [micro], separate_points=False),
        fastest(published(case, "  all three repaired", sizes, **REPAIRED)),
    ]
    if case.pipeline_dir:
        rows.insert(1, published(case, "  with online encoders", [micro], online=True))
    of_samples = [size * case.stage.forwards().points for size in sizes]
    return [
        *rows,
        ours(case, "soar_mega, forwards as large as the first row's", [micro]),
        fastest(ours(case, "soar_mega", of_samples)),
    ]


def rows_alone(
    case: Case, sizes: Sequence[int], points: Sequence[int], layers: Sequence[str], attentions: Sequence[str]
) -> list[Row]:
    """What a GPU is asked, one arm after the other: the published procedure and its repairs at their fastest size, and
    ours with each number of points per forward, each kind of layers ("local", "transformer_engine", "fp8") and each
    model.attention_backend, with and without CUDA graphs.
    """
    rows = [
        published(case, "published procedure", sizes),
        published(case, "  rollout without a graph", sizes, rollout_graph=False),
        published(case, "  one backward per point, no held graphs", sizes, hold_graphs=False),
        published(case, "  auxiliary points in one forward", sizes, separate_points=False),
        published(case, "  all three repaired", sizes, **REPAIRED),
    ]
    if case.pipeline_dir:
        rows.insert(1, published(case, "  with online encoders", sizes, online=True))
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "local": ("", {}),
        "transformer_engine": (", Transformer Engine", {"transformer_impl": "transformer_engine"}),
        "fp8": (", FP8", {"transformer_impl": "transformer_engine", "fp8": "hybrid"}),
    }
    ours_case = replace(case, recompute=False)
    for kind, attention, count, graphs in product(layers, attentions, points, ("none", "layers")):
        label, settings = kinds[kind]
        if attention != "sdpa":
            label += f", {attention} attention"
            settings = settings | {"attention_backend": attention}
        name = f"soar_mega{label}, {count} points{', CUDA graphs' if graphs == 'layers' else ''}"
        rows.append(ours(ours_case, name, [count], graphs, **settings))
    light = {"recompute_granularity": "selective", "recompute_modules": list(LIGHT)}
    recomputing = replace(case, recompute=True)
    return [
        *rows,
        ours(ours_case, "soar_mega, 28 points, recompute light, CUDA graphs", [28], "layers", **light),
        ours(recomputing, "soar_mega, 28 points, all recomputed", [28]),
    ]
