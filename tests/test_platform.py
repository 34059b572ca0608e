"""Each CPU stand-in is needed: without it, the named failure occurs. When it no longer does, the stand-in can go."""

import os
import resource
import subprocess
import sys
import tempfile

import megatron.core
import pytest
import torch
from gpu_stand_in import nccl_alone
from multirank import run_ranks
from packaging.version import Version

from soar_mega import platform
from soar_mega.config import ParallelConfig
from soar_mega.distributed import start_world


def small_engine():
    """A column-parallel layer under DDP and the distributed optimizer: (config, ddp, optimizer)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import MegatronModule, TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        perform_initialization=True,
    )

    class Net(MegatronModule):
        def __init__(self):
            super().__init__(config)
            self.model_type = ModelType.encoder_or_decoder
            self.linear = ColumnParallelLinear(
                8,
                8,
                config=config,
                init_method=torch.nn.init.ones_,
                bias=True,
                skip_bias_add=False,
                gather_output=True,
            )

        def forward(self, x):
            return self.linear(x)

        def set_input_tensor(self, tensor):
            pass

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            return self.linear.sharded_state_dict(f"{prefix}linear.", sharded_offsets, metadata)

    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config, ddp_config, Net())
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0
    )
    return config, ddp, get_megatron_optimizer(optimizer_config, [ddp], use_gloo_process_groups=False)


def one_step(ddp, optimizer):
    ddp.zero_grad_buffer()
    ddp(torch.ones(2, 1, 8))[0].sum().backward()
    ddp.finish_grad_sync()
    return optimizer.step()


def optimizer_state(ddp, optimizer, loading=False):
    from megatron.core import parallel_state

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model_state = ddp.module.sharded_state_dict(prefix="", metadata=metadata)
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)


def without_current_device():
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    start_world(ParallelConfig(tensor_model_parallel_size=2))
    with platform.without("current_device"):
        gather_from_sequence_parallel_region(torch.ones(2, 3))


def without_synchronize():
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection

    start_world(ParallelConfig(pipeline_model_parallel_size=2))
    from megatron.core import ModelParallelConfig, parallel_state

    config = ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["pp"])
    communicator = P2PCommunicator(pp_group=groups.pp, config=config)
    with platform.without("synchronize"):
        first = parallel_state.is_pipeline_first_stage()
        if first:
            communicator.send_forward(torch.ones(2), is_last_stage=False)
        else:
            communicator.recv_forward((2,), is_first_stage=False)


def without_current_stream():
    start_world(ParallelConfig())
    _, ddp, optimizer = small_engine()
    with platform.without("current_stream"):
        one_step(ddp, optimizer)


def without_factories():
    from megatron.core.pipeline_parallel import get_forward_backward_func

    start_world(ParallelConfig())
    _, ddp, _ = small_engine()
    with platform.without("factories"):
        get_forward_backward_func()(
            forward_step_func=lambda data, model: (model(torch.ones(2, 1, 8))[0], lambda y: (y.sum(), {})),
            data_iterator=None,
            model=ddp,
            num_microbatches=1,
            seq_length=2,
            micro_batch_size=1,
        )


def without_tensor_type():
    start_world(ParallelConfig())
    with platform.without("tensor_type"):
        small_engine()


def without_tensor_cuda():
    start_world(ParallelConfig())
    _, ddp, optimizer = small_engine()
    one_step(ddp, optimizer)
    with platform.without("tensor_cuda"):
        optimizer_state(ddp, optimizer)


def without_fused_adam():
    from megatron.core import dist_checkpointing

    start_world(ParallelConfig())
    with platform.without("fused_adam"), tempfile.TemporaryDirectory() as folder:
        _, ddp, optimizer = small_engine()
        one_step(ddp, optimizer)
        dist_checkpointing.save({"optimizer": optimizer_state(ddp, optimizer)}, folder)
        _, ddp, optimizer = small_engine()
        request = {"optimizer": optimizer_state(ddp, optimizer, loading=True)}
        loaded = dist_checkpointing.load(request, folder)
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])


def norm_of_gradients():
    """As megatron takes it; fails if the host reads a number for each tensor."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    start_world(ParallelConfig())
    with nccl_alone() as seen:
        gradients = [torch.full((2, size), 3.0, device="cuda") for size in (1, 2, 5)]
        seen.waits.clear()
        norm = get_grad_norm_fp32(gradients, grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert norm == pytest.approx(12.0)  # of 16 elements
    assert len(seen.waits) == 1, "waits for each tensor"


def without_gradient_norm():
    with platform.without("gradient_norm"):
        norm_of_gradients()


def gather_over_one_rank():
    """Sync parameters as megatron does; fails if that takes threads besides those of this thread's own operations."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    from megatron.core import parallel_state

    start_world(ParallelConfig())
    torch.set_num_threads(2)
    parameters = torch.ones(1 << 17).mul(2.0)
    threads = len(os.listdir("/proc/self/task"))
    group = parallel_state.get_data_parallel_group()
    buffers.dist_all_gather_func(parameters, parameters[:], group=group, async_op=False)
    assert len(os.listdir("/proc/self/task")) == threads, "a second pool of threads"


def without_parameter_gather():
    with platform.without("parameter_gather"):
        gather_over_one_rank()


def gather_over_two_ranks():
    """Sync parameters as megatron does; fails if that takes memory besides the parameters'."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    from megatron.core import parallel_state

    start_world(ParallelConfig())
    group = parallel_state.get_data_parallel_group()
    parameters = torch.full((2, 1 << 24), float(group.rank())).view(-1)  # 128 MiB
    mine = parameters.chunk(2)[group.rank()]
    before = peak_bytes()
    buffers.dist_all_gather_func(parameters, mine, group=group, async_op=False)
    assert peak_bytes() - before < parameters.nbytes / 2, "a second copy of the parameters"
    assert parameters.view(2, -1).mean(dim=1).tolist() == [0.0, 1.0]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def without_parameter_gather_over_two_ranks():
    with platform.without("parameter_gather"):
        gather_over_two_ranks()


NO_CUDA = "Torch not compiled with CUDA enabled|Found no NVIDIA driver|Cannot re-initialize CUDA in forked subprocess"
FAILURES = {
    "current_device": (without_current_device, 2, NO_CUDA),
    "synchronize": (without_synchronize, 2, NO_CUDA),
    "current_stream": (without_current_stream, 1, NO_CUDA),
    "factories": (without_factories, 1, NO_CUDA),
    "tensor_type": (without_tensor_type, 1, "torch.cuda.FloatTensor"),
    "tensor_cuda": (without_tensor_cuda, 1, NO_CUDA),
    "fused_adam": (without_fused_adam, 1, "step"),
    "gradient_norm": (without_gradient_norm, 1, "waits for each tensor"),
    "parameter_gather": (without_parameter_gather, 1, "a second pool of threads"),
}


@pytest.mark.parametrize("name", platform.STAND_INS)
def test_stand_in_is_needed(name):
    if name == "current_stream" and Version(megatron.core.__version__) < Version("0.19"):
        pytest.skip("megatron-core asks for a stream from 0.19 on")
    function, world_size, failure = FAILURES[name]
    with pytest.raises(AssertionError, match=f"rank . failed:(.|\n)*({failure})"):
        run_ranks(function, world_size, timeout=60)


def save_and_load():
    """All stand-ins together: steps, a save, and a load into a fresh optimizer."""
    from megatron.core import dist_checkpointing

    start_world(ParallelConfig())
    _, ddp, optimizer = small_engine()
    ok, norm, _ = one_step(ddp, optimizer)
    saved = optimizer_state(ddp, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save({"optimizer": saved}, folder)
        _, fresh_ddp, fresh = small_engine()
        loaded = dist_checkpointing.load(
            {"optimizer": optimizer_state(fresh_ddp, fresh, loading=True)}, folder
        )
        with torch.no_grad():
            fresh.load_state_dict(loaded["optimizer"])
    one_step(ddp, optimizer)
    one_step(fresh_ddp, fresh)
    weights = [next(iter(m.parameters())).detach() for m in (ddp, fresh_ddp)]
    return ok, norm, weights


def test_all_stand_ins_together():
    [(ok, norm, (weight, resumed))] = run_ranks(save_and_load, 1, timeout=60)
    assert ok and norm > 0
    torch.testing.assert_close(weight, resumed, rtol=0, atol=0)


def test_a_gradient_norm_is_read_once():
    run_ranks(norm_of_gradients, 1, timeout=60)


def test_one_rank_needs_no_second_pool_of_threads():
    run_ranks(gather_over_one_rank, 1, timeout=60)


def test_ranks_gather_parameters_in_place():
    run_ranks(gather_over_two_ranks, 2, timeout=60)
    with pytest.raises(AssertionError, match="a second copy of the parameters"):
        run_ranks(without_parameter_gather_over_two_ranks, 2, timeout=60)


def test_adam_equals_torch():
    torch.manual_seed(0)
    ours = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    a, b = platform.FusedAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = p.detach().sin() + 0.1
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert a.param_groups[0]["step"] == 5 and set(a.state[ours]) == {"exp_avg", "exp_avg_sq"}


def test_install_is_idempotent_and_reversible():
    stand_in = torch.cuda.current_device
    platform.install()
    assert torch.cuda.current_device is stand_in
    with platform.without("current_device"):
        assert torch.cuda.current_device is not stand_in
    assert torch.cuda.current_device is stand_in


@pytest.mark.parametrize("has_fused_adam", [False, True])
def test_with_cuda_only_adam_is_replaced_and_only_where_megatron_has_none_of_its_own(has_fused_adam) -> None:
    """In a process of its own, which is told that it has CUDA before megatron is imported."""
    code = f"""
import torch
torch.cuda.is_available = lambda: True
kept = torch.cuda.current_device, torch.cuda.synchronize, torch.zeros, torch.Tensor.type, torch.Tensor.cuda
import megatron.core.optimizer as optimizer
import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
if {has_fused_adam}:
    optimizer.USING_PYTORCH_OPTIMIZER = False
    optimizer.Adam = distributed_optimizer.Adam = "the one of Transformer Engine or apex"
before = optimizer.Adam
from soar_mega import platform
platform.install()
assert kept == (
    torch.cuda.current_device, torch.cuda.synchronize, torch.zeros, torch.Tensor.type, torch.Tensor.cuda
)
expected = before if {has_fused_adam} else platform.FusedAdam
assert optimizer.Adam is distributed_optimizer.Adam is expected
assert not optimizer.USING_PYTORCH_OPTIMIZER
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_device_contexts_still_reach_the_factories() -> None:
    """In a process of its own, because torch makes its list of factories once."""
    code = (
        "import torch; from soar_mega import platform; platform.install()\n"
        "with torch.device('meta'):\n"
        "    assert torch.empty(2).device.type == torch.zeros(2).device.type == 'meta'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_transformer_engine_is_not_used_where_it_cannot_compute(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported without a GPU')")
    code = (
        "from soar_mega import platform; platform.install()\n"
        "from megatron.core.extensions.transformer_engine import HAVE_TE\n"
        "import megatron.core.optimizer.clip_grads\n"
        "assert not HAVE_TE"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment, timeout=120)
