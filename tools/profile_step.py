"""Where the time of a training step goes, at any layout: phases, pipeline, memory, the GPU's kernels, operators.

    python tools/profile_step.py recipes/tiny/soar.yaml
    torchrun --nproc-per-node 2 tools/profile_step.py recipes/tiny/soar.yaml parallel.pipeline_model_parallel_size=2
    python tools/profile_step.py recipes/sd35_medium/soar.yaml model.pipeline_dir= model.preset=sd35_medium \\
        model.init=random stage.shift=3 --made-up 64x64

Takes steps as a run does, every second one recorded, so that what recording costs is known; then one step under
torch.profiler, and a checkpoint, which is removed again. Where a stage draws its samples, a collection is no part of
the step that it comes before, and is timed by itself. Writes into --out:

    profile.json   all numbers           trace.json     for ui.perfetto.dev or chrome://tracing
    profile.html   the same on one page  timeline.png, memory.png

profile.json as benchmarks/results/<date>-<device>-profile.json becomes a part of docs/performance.md.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import latent_size, number, positive, result_folder
from device_weights import drawn_on_device
from megatron.core import parallel_state
from origin import origin
from step_profile import memory, page, pictures
from step_profile.hooks import marked
from step_profile.made_up import MadeUp
from step_profile.operators import profiled
from step_profile.recorder import Recorder, Span
from step_profile.summary import bubble, by_phase, chrome_trace

from soar_mega.checkpoints.checkpoint import Saved, Saver
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.cli.process import start_process
from soar_mega.config import Recipe
from soar_mega.distributed import data_size, gather_on_rank_zero, is_rank_zero
from soar_mega.faults.agreement import on_rank_zero, world
from soar_mega.models.common.flops import Tokens, forward_work, image_tokens, recomputed_work, step_work
from soar_mega.models.common.pipeline_layout import chunks_per_rank, stage_work
from soar_mega.models.common.rank_parameters import trained_shares
from soar_mega.models.common.sizes import side_rule
from soar_mega.models.family import model_sizes
from soar_mega.phases import phases
from soar_mega.rules import at_least
from soar_mega.stages import load_recipe
from soar_mega.training.loop import Steps, make_loader
from soar_mega.training.throughput import least_seconds, peaks

Json = dict[str, Any]


class Profile:
    """The steps of a run on this rank, some of them recorded. Collective over the world."""

    def __init__(self, recipe: Recipe, run: RunFolder, made_up: tuple[int, int, int] | None) -> None:
        self.recipe, self.run = recipe, run
        self.memory_before = memory.now()
        loader: Any = MadeUp(recipe, *made_up) if made_up else make_loader(recipe)
        with drawn_on_device():
            self.steps = Steps(recipe, run, loader)
        self.recorder = Recorder()
        self.held_by_graphs = 0
        self.first_spans: list[int] = []  # of each recorded step
        self.micro_batches: dict[str, int] = {}
        self.collections: list[Json] = []  # phases of each
        self.seconds: dict[str, list[float]] = {"recorded": [], "not recorded": []}
        self.process_seconds: dict[str, list[float]] = {"recorded": [], "not recorded": []}

    def collect(self) -> None:
        """What comes before a step that has nothing left to learn from; no part of it."""
        collector = self.steps.collector
        if collector is None or not collector.is_empty:
            return
        recorder = Recorder()
        recorder.start(lambda: 0)
        with recorder.following(phases):
            self.steps.collect()
        recorder.stop()
        self.collections.append(by_phase(recorder.spans, 1))

    def step(self) -> tuple[float, float]:
        """One step; its seconds, and those of processor time."""
        self.collect()
        started, process_started = time.perf_counter(), time.process_time()
        phases.begin_step(self.steps.progress.iteration + 1, "agreement")
        self.steps.learn()
        self.steps.update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.recorder.close()
        return time.perf_counter() - started, time.process_time() - process_started

    def recorded_step(self) -> tuple[float, float]:
        """One step that is recorded."""
        self.collect()  # in no recorded phase
        self.first_spans.append(len(self.recorder.spans))
        with marked(self.recorder, self.steps.engine, self.micro_batches):
            return self.step()

    def take(self, warmup: int, count: int) -> None:
        """Steps that are not measured, then `count` recorded ones in turn with as many that are not."""
        for _ in range(warmup):
            self.step()
        self.held_by_graphs = memory.held_by_graphs()  # recordings were made by now
        dist.barrier()
        self.recorder.start(lambda: memory.now() + self.held_by_graphs)
        for _ in range(count):
            for name, step in (("recorded", self.recorded_step), ("not recorded", self.step)):
                seconds, process_seconds = step()
                self.seconds[name].append(seconds)
                self.process_seconds[name].append(process_seconds)
        self.recorder.stop()

    def checkpoint(self) -> Json:
        """What saving takes."""
        saved: list[Saved] = []
        phases.leave_step("checkpoint")
        saver = Saver(self.run, self.recipe.checkpoint, self.steps.sizes, saved.append)
        self.steps.progress.loader = self.steps.loader.state_dict()
        collector = self.steps.collector
        pieces = [] if collector is None else collector.pieces()
        saver.save(self.steps.engine, self.steps.progress, pieces)
        saver.finish()
        saver.close()
        return {"blocked_seconds": saved[0].blocked_seconds, "seconds": saved[0].seconds}

    def mine(self) -> Json:
        """What this rank knows; spans as they are, of the last recorded step alone."""
        by_name = by_phase(self.recorder.spans, len(self.first_spans))
        clocks = ("host", "process", "device")
        last = self.first_spans[-1]
        return {
            "rank": dist.get_rank(),
            "place": place(),
            "phases": by_name,
            "sums": {clock: sum(phase.get(clock, 0.0) for phase in by_name.values()) for clock in clocks},
            "step_seconds": statistics.mean(self.seconds["recorded"]),
            "memory": {
                "before": self.memory_before,
                "kinds": memory.by_kind(self.steps.engine) | {"CUDA graphs": self.held_by_graphs},
                "most": max(count for _, count in self.recorder.notes),
                "samples": self.recorder.notes[last:],
            },
            "spans": self.recorder.spans[last:],
        }

    def collection(self) -> Json | None:
        """What collecting takes on this rank, where the stage does; the first one warms up, if there are others."""
        collector = self.steps.collector
        if collector is None:
            return None
        counted = self.collections[1:] or self.collections
        seconds = [sum(phase["host"] for phase in by_name.values()) for by_name in counted]
        return {
            "steps_between": collector.place.learned_from // self.recipe.train.global_batch_size,
            "count": len(counted),
            "seconds": statistics.median(seconds),
            "phases": counted[-1],
        }

    def work(self) -> Json:
        """Floating point operations of a step, and how fast they were done."""
        recipe, batch = self.recipe, self.steps.batch
        sizes, samples = model_sizes(recipe.model), recipe.train.global_batch_size
        tokens = Tokens(image_tokens(sizes, batch.latent_shape[1:]), batch.text_length)
        forwards = self.steps.recipe.stage.asking(sizes.guidance_embeds).forwards()
        answers, points = forwards.answers, forwards.points
        forward, shares = forward_work(sizes, tokens), trained_shares(sizes, recipe)
        step = step_work(forward, round(samples * answers), samples * points, shares)
        model = recipe.model
        again = recomputed_work(sizes, tokens, model)
        seconds = statistics.median(self.seconds["not recorded"]) * dist.get_world_size()
        device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        known = peaks(recipe, device_name)
        return {
            "forwards_per_sample": {"answers": answers, "points": points},
            "tokens": {"image": tokens.image, "text": tokens.text},
            "step": dataclasses.asdict(step) | {"total": step.total},
            "recomputed": samples * points * again.total,
            "forward_of_pipeline_stages": [each.total for each in stage_work(sizes, recipe.parallel, tokens)],
            "tflops_per_process": step.total / seconds / 1e12,
            "mfu": None if known is None else least_seconds(step, *known) / seconds,
        }


def place() -> dict[str, int]:
    """Of this rank in the layout."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
    }


def measure(recipe: Recipe, arguments: argparse.Namespace, run: RunFolder) -> tuple[Json, Json] | None:
    """All numbers and the trace, on rank 0. Collective over the world."""
    made_up = None if arguments.made_up is None else (*arguments.made_up, arguments.text_length)
    profile = Profile(recipe, run, made_up)
    try:
        profile.take(arguments.warmup, arguments.steps)
        operators: Json = {}
        kernels: Json | None = None
        median = statistics.median(profile.seconds["not recorded"])
        profile.collect()
        if is_rank_zero():
            operators, kernels = profiled(profile.step, median)
        else:
            profile.step()
        saved = profile.checkpoint() if arguments.checkpoint else None
        ranks = gather_on_rank_zero(profile.mine())
    finally:
        profile.steps.close()
    if not is_rank_zero():
        return None
    spans: dict[int, list[Span]] = {rank["rank"]: rank.pop("spans") for rank in ranks}
    pipeline = sorted((r for r in ranks if is_first_pipeline(r)), key=lambda r: r["place"]["pipeline"])
    on_gpu = torch.cuda.is_available()
    chunks = chunks_per_rank(recipe.parallel)
    from_the_step_on(ranks, spans)
    said = {
        **origin("profile_step"),
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "layout": layout(recipe),
        "seconds": profile.seconds,
        "process_seconds": profile.process_seconds,
        "median_seconds": median,
        "overhead": {"clock": added(profile.seconds), "processor": added(profile.process_seconds)},
        "work": profile.work(),
        "ranks": ranks,
        "bubble": {
            phase: bubble([spans[r["rank"]] for r in pipeline], phase, count, chunks, on_gpu)
            for phase, count in profile.micro_batches.items()
        },
        "timeline_clock": "the GPU's clock" if on_gpu else "the clock",
        "timeline": timeline([(r["rank"], spans[r["rank"]]) for r in pipeline], on_gpu),
        "operators": operators,
        "kernels": kernels,
        "gpu_busy": None if kernels is None else kernels["busy_seconds"] / median,
        "collection": profile.collection(),
        "checkpoint": saved,
    }
    return said, chrome_trace(spans)


def added(seconds: dict[str, list[float]]) -> float:
    """By recording, as a share."""
    return statistics.median(seconds["recorded"]) / statistics.median(seconds["not recorded"]) - 1.0


def is_first_pipeline(rank: Json) -> bool:
    return not any(rank["place"][axis] for axis in ("tensor", "context", "data"))


def from_the_step_on(ranks: list[Json], spans: dict[int, list[Span]]) -> None:
    """Counts the times of memory from the first beginning of the step on any rank."""
    began = min(span.start for mine in spans.values() for span in mine)
    for rank in ranks:
        rank["memory"]["samples"] = [(when - began, count) for when, count in rank["memory"]["samples"]]


def timeline(pipeline: list[tuple[int, list[Span]]], on_gpu: bool) -> list[Json]:
    """What each rank of a pipeline did, in seconds since the step began on the first of them."""
    start, end = ("device_start", "device_end") if on_gpu else ("start", "end")
    began = min(getattr(span, start) for _, spans in pipeline for span in spans)
    return [
        {"rank": rank, "spans": [(s.name, getattr(s, start) - began, getattr(s, end) - began) for s in spans]}
        for rank, spans in pipeline
    ]


def layout(recipe: Recipe) -> Json:
    """What the processes of the run are."""
    parallel, train = recipe.parallel, recipe.train
    return {
        "engine": parallel.engine,
        "processes": dist.get_world_size(),
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": chunks_per_rank(parallel),
        "CP": parallel.context_parallel_size,
        "DP": data_size(),
        "samples per step": train.global_batch_size,
        "samples per answer's forward": train.micro_batch_size,
        "points per forward": train.points_per_micro_batch or train.micro_batch_size,
        "dtype": recipe.model.dtype,
        "recomputation": ", ".join(sorted(recipe.model.made_again)) or recipe.model.recompute_granularity,
        "layers": recipe.model.transformer_impl,
        "FP8": recipe.model.fp8 or "none",
        "CUDA graphs": train.cuda_graphs if torch.cuda.is_available() else "none",
    }


def write(said: Json, trace: Json, out: Path) -> None:
    """The files of a profile."""
    drawn = {"timeline": pictures.timeline(said), "memory": pictures.memory(said)}
    for name, png in drawn.items():
        (out / f"{name}.png").write_bytes(png)
    (out / "profile.json").write_text(json.dumps(said, indent=1) + "\n")
    (out / "trace.json").write_text(json.dumps(trace) + "\n")
    (out / "profile.html").write_text(page.page(said, drawn))


def summary(said: Json) -> str:
    """The step, and what rank 0 did in it."""
    lines = [
        f"step {page.milliseconds(said['median_seconds'])}, recording adds {page.overhead(said)}; "
        f"{said['work']['tflops_per_process']:.4g} TFLOP/s per process"
        + ("" if said["work"]["mfu"] is None else f", MFU {said['work']['mfu']:.1%}")
        + ("" if said["gpu_busy"] is None else f", GPU busy {said['gpu_busy']:.1%}")
    ]
    for phase, one in said["bubble"].items():
        lines.append(f"{phase}: pipeline stands still {one['measured']:.1%}, ideal bubble {one['ideal']:.1%}")
    for name, phase in said["ranks"][0]["phases"].items():
        clocks = [f"{clock} {page.milliseconds(phase[clock])}" for clock in phase if clock != "calls"]
        lines.append(f"  {name:28} {'  '.join(clocks)}")
    if said["collection"] is not None:
        lines.append(f"collecting samples: {page.collected(said['collection'])}")
    if said["checkpoint"] is not None:
        lines.append(
            f"checkpoint: training stands still {page.milliseconds(said['checkpoint']['blocked_seconds'])}, written "
            f"after {page.milliseconds(said['checkpoint']['seconds'])}"
        )
    if said["kernels"] is not None:
        for kind in said["kernels"]["kinds"]:
            taken = f"{page.milliseconds(kind['seconds'])}, {kind['share']:.1%} of the step"
            lines.append(f"  {kind['name']:28} {kind['launches']} launches, {taken}")
    return "\n".join(lines)


def recipe_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Recipe:
    """What is profiled; ends the process where it cannot be."""
    overrides = [*arguments.overrides, "checkpoint.load=", f"checkpoint.save={arguments.out}/run"]
    if arguments.made_up is not None:
        with contextlib.suppress(ValueError, OSError):  # what is wrong is said below
            stage = load_recipe(arguments.recipe, overrides).stage
            if stage.collects:
                parser.error(
                    f"--made-up: {stage.name} draws its samples, there are none to make up: leave it out"
                )
        overrides.append("data.path=made-up")
    try:
        recipe = load_recipe(arguments.recipe, overrides)
        holds, words = side_rule(model_sizes(recipe.model))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not all(map(holds, arguments.made_up or ())):
        parser.error(f"--made-up: each side must be {words} for this model")
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    parser.add_argument(
        "--steps", type=positive, default=5, help="recorded steps (5), and as many that are not"
    )
    parser.add_argument("--warmup", type=number(int, at_least(0)), default=3, help="steps before them (3)")
    parser.add_argument(
        "--made-up", metavar="HxW", type=latent_size, help="noise of this latent size in place of data.path"
    )
    parser.add_argument("--text-length", type=positive, default=154, help="tokens of its prompts (154)")
    parser.add_argument("--no-checkpoint", dest="checkpoint", action="store_false")
    arguments = parser.parse_intermixed_args()
    recipe = recipe_of(arguments, parser)
    start_process()
    with world(recipe):
        on_rank_zero(lambda: result_folder(arguments.out))
        folder = Path(on_rank_zero(lambda: tempfile.mkdtemp(prefix="run-", dir=arguments.out)))
        with contextlib.ExitStack() as stack:
            if is_rank_zero():
                stack.callback(shutil.rmtree, folder)
            recipe.checkpoint.save = str(folder)  # also where embeddings of prompts are kept
            found = measure(recipe, arguments, RunFolder(folder))
            if found is not None:
                said, trace = found
                write(said, trace, arguments.out)
                print(summary(said))
                print(f"wrote {arguments.out}/profile.html")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"profile_step.py: {error}")
