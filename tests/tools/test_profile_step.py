"""A profile has all phases of all ranks; its page has the numbers of its JSON."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import performance_page
import profile_step
import pytest
import torch
from multirank import run_ranks
from rl_cases import rl_words
from step_profile import kernels, memory, page
from step_profile.made_up import MadeUp
from step_profile.operators import on_device, on_host
from step_profile.recorder import Recorder, Span
from step_profile.summary import bubble, by_phase, chrome_trace
from tiny_runs import ROOT, tiny_words
from torch.autograd import DeviceType

from soar_mega.config import ParallelConfig
from soar_mega.distributed import start_world
from soar_mega.kernels.variants import all_variants
from soar_mega.phases import Phases, phases
from soar_mega.stages import load_recipe


def profiled(arguments: list[str]) -> None:
    os.chdir(ROOT)
    before = phases.enter
    sys.argv = ["profile_step.py", *arguments]
    profile_step.main()
    assert phases.enter == before  # what was marked is unmarked


def profile(shards: Path, out: Path, ranks: int, **overrides: Any) -> dict[str, Any]:
    words = tiny_words(shards, out / "run", **overrides)
    recipe = str(ROOT / "recipes" / "tiny" / "soar.yaml")
    arguments = [recipe, *words, "--out", str(out), "--steps", "2", "--warmup", "1"]
    run_ranks(profiled, ranks, arguments, timeout=180)
    said: dict[str, Any] = json.loads((out / "profile.json").read_text())
    assert not list(out.glob("run-*"))  # the checkpoint is removed again
    return said


def check_numbers(said: dict[str, Any], out: Path, inner: set[str]) -> None:
    """Phases of each rank that add up to its steps, and a page that says the same."""
    html = (out / "profile.html").read_text()
    shown = page.first_pipeline(said)
    assert [rank["place"]["pipeline"] for rank in shown] == list(range(said["layout"]["PP"]))
    for rank in said["ranks"]:
        assert {"agreement", "data", "answer", "learn", "optimizer"} | inner <= rank["phases"].keys()
        # the clock around a step is read outside of the recording
        assert 0.5 * rank["step_seconds"] < rank["sums"]["host"] <= rank["step_seconds"]
        assert rank["sums"]["host"] == pytest.approx(sum(p["host"] for p in rank["phases"].values()))
        assert all(phase["host"] >= 0 for phase in rank["phases"].values())
        assert rank["memory"]["most"] > rank["memory"]["before"] > 0
        for name in inner if rank in shown else ():
            assert f"<td>{name}</td><td>{page.milliseconds(rank['phases'][name]['host'])}</td>" in html
    assert page.milliseconds(said["median_seconds"]) in html and page.overhead(said) in html
    assert page.milliseconds(said["operators"]["top"][0]["host_seconds"]) in html
    assert said["kernels"] is None and "<h2>Kernels</h2>" not in html
    for picture in ("timeline", "memory"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert html.count("data:image/png;base64,") == 2
    # times begin with the step, though it was not the first
    assert min(start for row in said["timeline"] for _, start, _ in row["spans"]) == 0
    before = said["seconds"]["recorded"][0] + said["seconds"]["not recorded"][0]
    assert all(0 <= rank["memory"]["samples"][0][0] < before for rank in said["ranks"])
    assert said["checkpoint"]["seconds"] >= said["checkpoint"]["blocked_seconds"] > 0
    assert said["work"]["step"]["total"] > 0 and said["work"]["mfu"] is None


def test_two_pipeline_ranks(shards: Path, tmp_path: Path) -> None:
    said = profile(shards, tmp_path, 2, parallel__pipeline_model_parallel_size=2)
    assert [rank["place"]["pipeline"] for rank in said["ranks"]] == [0, 1]
    inner = {
        "answer/forward",
        "learn/forward",
        "learn/backward",
        "learn/messages",
        "learn/gradient reduction",
    }
    check_numbers(said, tmp_path, inner | {"optimizer/parameter gather"})
    # 16 samples, 4 at once; 48 points, 12 at once
    assert said["ranks"][0]["phases"]["learn/backward"]["calls"] == 4
    for one in said["bubble"].values():
        assert one["micro_batches"] == 4 and one["ideal"] == pytest.approx(1 / 5)
        assert 0 < one["measured"] < 1
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        backwards = [e for e in trace if e["pid"] == rank and e["name"] == "backward"]
        assert len(backwards) == 4
    shutil.copy(tmp_path / "profile.json", tmp_path / "2026-01-02-cpu-profile.json")
    shown = performance_page.page(tmp_path)
    assert f"a step takes {1e3 * said['median_seconds']:.1f} ms" in shown
    assert all(
        f"| {name} | {1e3 * p['host']:.1f} |" in shown for name, p in said["ranks"][0]["phases"].items()
    )
    kinds = said["ranks"][1]["memory"]["kinds"]
    assert kinds["optimizer"] >= 1.9 * kinds["gradients"] > 0 and kinds["kept weights"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, parallel, inner",
    [
        (
            4,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "overlap_grad_reduce": "true",
                "overlap_param_gather": "true",
            },
            {"learn/gradient reduction", "answer/parameter gather"},
        ),
        (
            4,
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": "true"},
            set(),
        ),
        (2, {"engine": "deepspeed", "zero_stage": 3}, set()),
    ],
    ids=["interleaved", "tensor and context", "deepspeed"],
)
def test_every_layout(
    shards: Path, tmp_path: Path, ranks: int, parallel: dict[str, Any], inner: set[str]
) -> None:
    settings = {f"parallel__{key}": value for key, value in parallel.items()}
    said = profile(shards, tmp_path, ranks, train__ema_decay=0.0, **settings)
    check_numbers(said, tmp_path, {"answer/forward", "learn/forward", "learn/backward"} | inner)
    assert len(said["ranks"]) == ranks
    # a wait and a start for each group of buckets, however many parameters ask in however many forwards
    gathers = [rank["phases"].get("answer/parameter gather", {"calls": 0})["calls"] for rank in said["ranks"]]
    assert all(calls < 10 for calls in gathers)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["flow_grpo", "diffusion_nft"])
def test_a_collection_is_no_part_of_a_step(stage: str, tmp_path: Path) -> None:
    """Four steps learn from one collection, and a recorded step may or may not come after one."""
    levels = ["stage.num_levels=2"] if stage == "diffusion_nft" else []
    words = [word for word in rl_words(tmp_path, data__prompt_cache="") if "validation" not in word]
    recipe = str(ROOT / "recipes" / "tiny" / f"{stage}.yaml")
    out = tmp_path / "out"
    run_ranks(profiled, 1, [recipe, *words, *levels, "--out", str(out), "--steps", "2", "--warmup", "0"])
    said = json.loads((out / "profile.json").read_text())
    check_numbers(said, out, {"learn/forward", "learn/backward"})
    collection = said["collection"]
    assert said["ranks"][0]["phases"].keys().isdisjoint(collection["phases"])
    assert {"collect", "rewards"} <= collection["phases"].keys()
    # 5 steps, 4 of one collection: the first one is not counted
    assert collection["steps_between"] == 4 and collection["count"] == 1 and collection["seconds"] > 0
    assert collection["seconds"] == pytest.approx(sum(p["host"] for p in collection["phases"].values()))
    assert page.collected(collection) in (out / "profile.html").read_text()
    assert {path.name for path in out.iterdir()} == {
        *("profile.json", "profile.html", "trace.json", "timeline.png", "memory.png")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--made-up", "8"], "--made-up: '8' must be a height and a width, as in 64x64"),
        (["--made-up", "0x8"], "--made-up: '0': it must be a whole number, at least 1"),
        (
            ["--made-up", "8x8", "--text-length", "0"],
            "--text-length: '0': it must be a whole number, at least 1",
        ),
        (["--steps", "0"], "--steps: '0': it must be a whole number, at least 1"),
        (["--warmup", "-1"], "--warmup: '-1': it must be a whole number, at least 0"),
        (["train.nosuch=1"], "train.nosuch"),
        (["--made-up", "8x8"], "--made-up: flow_grpo draws its samples"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys,
        "argv",
        ["profile_step.py", "recipes/tiny/flow_grpo.yaml", *words, "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit, match="2"):
        profile_step.main()
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["7x8", "8x7", "8x18"])
def test_latents_that_the_model_cannot_take_are_refused(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(profile_step, "start_process", lambda: pytest.fail("something is measured"))
    words = ["recipes/tiny/soar.yaml", "--made-up", size, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *words])
    with pytest.raises(SystemExit, match="2"):
        profile_step.main()
    assert "--made-up: each side must be a multiple of 2 and at most 16 for this" in capsys.readouterr().err


def test_what_is_found_wrong_later_is_one_line(tmp_path: Path) -> None:
    words = ["recipes/tiny/soar.yaml", f"data.path={tmp_path}/absent", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "tools/profile_step.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"profile_step.py: {tmp_path}/absent does not exist: give")


def test_a_file_is_no_place_for_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_step, "measure", lambda *arguments: pytest.fail("something is measured"))
    monkeypatch.setattr(profile_step, "start_process", lambda: None)
    monkeypatch.setattr(profile_step, "world", lambda recipe: contextlib.nullcontext())
    monkeypatch.setattr(profile_step, "on_rank_zero", lambda action: action())
    (tmp_path / "out").write_text("")
    recipe = str(ROOT / "recipes/tiny/soar.yaml")
    monkeypatch.setattr(
        sys, "argv", ["profile_step.py", recipe, "--made-up", "8x8", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match=r"^--out: .*out cannot be written: File exists$"):
        profile_step.main()


def test_made_up_samples_are_what_they_say(tmp_path: Path) -> None:
    """A run asks for their shapes before it has seen any."""
    words = tiny_words(tmp_path / "absent", tmp_path / "run")
    start_world(ParallelConfig())
    loader = MadeUp(load_recipe(ROOT / "recipes/tiny/soar.yaml", words), 8, 4, 7)
    batch = next(loader)
    assert loader.info.latent_shape(loader.info.largest_bucket) == batch.latent_shape == (4, 8, 4)
    assert loader.info.text_shape[0] == batch.text_length == 7 and loader.info.samples == len(batch)


@pytest.mark.slow
def test_made_up_samples_need_no_data(tmp_path: Path) -> None:
    words = tiny_words(tmp_path / "absent", tmp_path / "run")
    arguments = [str(ROOT / "recipes/tiny/soar.yaml"), *words, "--out", str(tmp_path), "--no-checkpoint"]
    arguments += ["--steps", "1", "--warmup", "0", "--made-up", "8x4", "--text-length", "7"]
    run_ranks(profiled, 1, arguments)
    said = json.loads((tmp_path / "profile.json").read_text())
    assert said["work"]["tokens"] == {"image": 8, "text": 7} and said["checkpoint"] is None


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr("time.process_time", lambda: self.now / 2)


def test_seconds_of_a_phase_are_without_what_is_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, mine, recorder = Clock(monkeypatch), Phases(), Recorder()

    def work(seconds: float) -> None:
        clock.now += seconds

    recorder.start(lambda: 5)
    with recorder.following(mine):
        for _ in range(2):
            mine.begin_step(1, "data")
            work(1)
            mine.enter("learn")
            work(2)
            recorder.around(lambda: (work(3), recorder.around(work, "gather")(4)), "forward")()
            recorder.around(work, "forward")(5)
            work(6)
            recorder.close()
    mine.enter("nothing that is recorded")
    recorder.stop()
    found = by_phase(recorder.spans, 2)
    assert {name: (p["host"], p["process"], p["calls"]) for name, p in found.items()} == {
        "data": (1, 0.5, 1),
        "learn": (8, 4, 1),
        "learn/forward": (8, 4, 2),
        "learn/gather": (4, 2, 1),
    }
    assert list(found) == ["data", "learn", "learn/forward", "learn/gather"]
    assert recorder.notes[-1] == (42, 5) and "device" not in found["data"]


def spans(*intervals: tuple[str, float, float]) -> list[Span]:
    return [Span(name, "learn", 1, start, 0.0, end) for name, start, end in intervals]


def test_an_ideal_pipeline_has_the_ideal_bubble() -> None:
    """Two ranks, three micro-batches, forward 1 and backward 2: each stands still for 3 of 12."""
    first = spans(("forward", 0, 1), ("forward", 1, 2), ("backward", 4, 6), ("forward", 6, 7))
    first += spans(("messages", 2, 4), ("backward", 7, 9), ("backward", 10, 12))
    second = spans(("forward", 1, 2), ("backward", 2, 4), ("forward", 4, 5), ("backward", 5, 7))
    second += spans(("forward", 7, 8), ("backward", 8, 10))
    found = bubble([first, second], "learn", 3, 1)
    assert found["measured"] == pytest.approx(found["ideal"]) == pytest.approx(0.25)
    assert found["busy_seconds"] == [9, 9] and found["seconds"] == 12
    assert bubble([first, second], "learn", 3, 2)["ideal"] == pytest.approx(1 / 7)
    for span in first + second:
        span.device_start, span.device_end = 2 * span.start, 2 * span.end
    assert bubble([first, second], "learn", 3, 1, is_on_gpu=True)["seconds"] == 24
    trace = chrome_trace({0: first, 1: second})["traceEvents"]
    assert {(e["pid"], e["tid"]) for e in trace if e["ph"] == "X"} == {
        (rank, row) for rank in (0, 1) for row in ("host", "device")
    }
    assert sum(e["dur"] for e in trace if e["ph"] == "X" and e["tid"] == "host") == pytest.approx(20e6)


def test_kernels_that_run_at_once_count_once() -> None:
    assert kernels.covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert kernels.covered([]) == 0


TORCH_COPY = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
    "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const>(at::TensorIteratorBase&)>(int)"
)
NAMES = {  # of profiles on H100s, of kernels/source and of Transformer Engine's library
    "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN": "matrix products",
    "nvjet_sm90_tss_192x192_64x3_2x1_v_badd_coopB_NTN": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(float)": "matrix products",
    "nvjet_sm90_qqtst_128x256_128x6_2x1_v_bz_TNT": "matrix products in FP8",
    "nvjet_qqtst_128x160_128x6_2x1_v_bz_TNT": "matrix products in FP8",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
    "cutlass::bfloat16_t> >(pytorch_flash::Flash_fwd_params)": "attention, forward",
    "void pytorch_flash::flash_bwd_dot_do_o_kernel<true>(pytorch_flash::Flash_bwd_params)": "attention, backward",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2> > > "
    ">(flash::Params)": "attention, forward",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::CollectiveMainloopBwdSm90<2> > > "
    ">(flash::Params)": "attention, backward",
    "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<128> > > >(flash::Params)": (
        "attention, backward"
    ),
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0": (
        "attention, forward"
    ),
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_kernel0_0": (
        "attention, backward"
    ),
    "adaln_forward_kernel": "adaLN and QK norm, forward",
    "qk_norm_backward_kernel": "adaLN and QK norm, backward",
    "bias_gelu_forward_kernel": "GELU, biases and gated adds",
    "gated_add_backward_kernel": "GELU, biases and gated adds",
    "rollout_renoise_tokens_kernel": "SOAR's own",
    "correction_loss_kernel": "SOAR's own",
    "sum_kernel": "sums",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >(at::native::ReduceOp<float>)": "sums",
    TORCH_COPY: "elementwise and copies",
    "Memcpy DtoD (Device -> Device)": "elementwise and copies",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "FusedOptimizerTensorListMetadata<4> >(float)": "optimizer",
    "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>(float*)": "casts to FP8",
    "void transformer_engine::(anonymous namespace)::cast_transpose_general_kernel<8, 4>(float*)": "casts to FP8",
    "(anonymous namespace)::cast_transpose_optimized_kernel(float*)": "casts to FP8",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
    "a_kernel_that_nobody_knows": "rest",
}


def test_kernels_by_kind() -> None:
    assert {name: kernels.kind_of(name) for name in NAMES} == NAMES
    ours = {variant.kernel: variant.module for variant in all_variants()}
    assert len(set(ours)) == len({(v.module, v.kernel) for v in all_variants()})  # a name of its own for each
    assert not {kernels.kind_of(name) for name in ours} & {
        kernels.REST,
        "elementwise and copies",
        "matrix products",
    }
    assert kernels.short(TORCH_COPY).startswith(
        "elementwise_kernel<128, 4, gpu_kernel_impl_nocast<direct_copy_kern"
    )
    assert len(kernels.short(TORCH_COPY)) == 80


def event(name: str, start: float, end: float, device: DeviceType, is_range: bool = False) -> Any:
    """As torch.profiler has it, in microseconds."""
    return SimpleNamespace(
        name=name,
        key=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=device,
        is_user_annotation=is_range,
        count=1,
        self_cpu_time_total=end - start if device == DeviceType.CPU else 0.0,
        self_device_time_total=1e12,  # graph replays have what is nobody's added to theirs
    )


def test_only_what_runs_on_the_gpu_is_its_work(tmp_path: Path) -> None:
    """A made-up step: a graph's replay, kernels of it on two streams, and what the profiler puts in beside them."""
    events = [
        event("_Replayed", 0, 50, DeviceType.CPU),
        event("Command Buffer Full", 50, 5e7, DeviceType.CPU),
        event("learn", 0, 1e6, DeviceType.CUDA, is_range=True),
        event("nvjet_sm90_tst_192x192", 0, 4e5, DeviceType.CUDA),
        event("nvjet_sm90_tst_128x224", 4e5, 5e5, DeviceType.CUDA),
        event("adaln_forward_kernel", 3e5, 6e5, DeviceType.CUDA),
        event("nvjet_sm90_tst_192x192", 7e5, 8e5, DeviceType.CUDA),
    ]
    assert [row["name"] for row in on_host(events)] == ["Command Buffer Full", "_Replayed"]
    found = kernels.of_a_step(on_device(events), step_seconds=0.8)
    assert found["busy_seconds"] == pytest.approx(0.7) and found["launches"] == 4
    kinds = {kind["name"]: (kind["seconds"], kind["launches"], kind["share"]) for kind in found["kinds"]}
    assert kinds == {
        "matrix products": (pytest.approx(0.6), 3, pytest.approx(0.75)),
        "adaLN and QK norm, forward": (pytest.approx(0.3), 1, pytest.approx(0.375)),
    }
    assert [row["name"] for row in found["top"]] == [
        "nvjet_sm90_tst_192x192",
        "adaln_forward_kernel",
        "nvjet_sm90_tst_128x224",
    ]
    html = page.kernels(found)
    assert "<td>matrix products</td><td>3</td><td>600.00 ms</td><td>75.0%</td>" in html
    row = "<code>adaln_forward_kernel</code></td><td>adaLN and QK norm, forward</td><td>1</td><td>300.00 ms</td>"
    assert row in html
    table = "\n".join(performance_page.step_kernels(found))
    assert "| matrix products | 600.0 | 3 | 75.0 % | `nvjet_sm90_tst_192x192` |" in table


def test_shared_storage_counts_once() -> None:
    whole, seen = torch.zeros(10), set[int]()
    assert memory._bytes([whole, whole[2:], None, 3, torch.empty(4, device="meta")], seen) == 40
    assert memory._bytes([whole[:1], torch.ones(2)], seen) == 8


def test_memory_of_graphs_is_what_no_tensor_has_in_their_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 10},  # of the allocator: free
        {"segment_pool_id": (0, 1), "total_size": 50, "allocated_size": 20},
        {"segment_pool_id": (0, 2), "total_size": 7, "allocated_size": 0},
    ]
    assert memory.held_by_graphs() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert memory.held_by_graphs() == 30 + 7
