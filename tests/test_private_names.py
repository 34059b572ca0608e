"""Each private or undocumented name that soar_mega/private_names.py uses is there, in the versions at hand."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import soar_mega

PACKAGE = Path(soar_mega.__file__).parent
HOMES = {"private_names.py", "platform.py"}  # platform's are guarded by tests/test_platform.py

CHECKPOINTS = "megatron.core.dist_checkpointing"
IMPORTED = {
    "torch": ["UntypedStorage._new_shared"],
    "torch.utils.data.dataloader": ["_MultiProcessingDataLoaderIter._shutdown_workers"],
    "torch.distributed.distributed_c10d": ["_get_default_store"],
    "torch._C._distributed_c10d": ["_dump_nccl_trace"],
    "torch.distributed.checkpoint.api": ["_wrap_exception", "CheckpointException.failures"],
    "torch.distributed.checkpoint.filesystem": ["_write_item", "DEFAULT_SUFFIX"],
    f"{CHECKPOINTS}.strategies.torch": [
        "_replace_state_dict_keys_with_sharded_keys",
        "mcore_to_pyt_state_dict",
        "MCoreSavePlanner.create_local_plan",
        "MCoreSavePlanner.lookup_object",
        "TorchDistSaveShardedStrategy.async_save",
    ],
    # announced to be removed
    f"{CHECKPOINTS}.strategies.async_utils": ["AsyncRequest"],
    f"{CHECKPOINTS}.strategies.filesystem_async": [
        "FileSystemWriterAsync.prepare_write_data",
        "FileSystemWriterAsync.retrieve_write_results",
    ],
    f"{CHECKPOINTS}.strategies.state_dict_saver": [
        "save_state_dict_async_plan",
        "save_state_dict_async_finalize",
    ],
    # undocumented
    f"{CHECKPOINTS}.state_dict_utils": ["load_preprocess"],
    f"{CHECKPOINTS}.serialization": ["load_sharded_metadata", "load_common_state_dict"],
    f"{CHECKPOINTS}.utils": ["extract_sharded_base", "extract_sharded_tensors_and_factories"],
    "megatron.core.optimizer.distrib_optimizer": [
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        "DistributedOptimizer._get_model_param_range_map",
    ],
    "megatron.core.transformer.cuda_graphs": ["_set_capture_start", "_set_capture_end"],
    "deepspeed.ops": ["__compatible_ops__"],
    "deepspeed.runtime.zero.stage3": ["DeepSpeedZeroOptimizer_Stage3.get_param_id"],
    "deepspeed.runtime.zero.parameter_offload": ["DeepSpeedZeRoOffload.partition_all_parameters"],
    "deepspeed.utils.tensor_fragment": ["tensor_fragment.get_lp_grad_fragment"],
}
# what instances hold: written in these sources as `something.name = ...`, or as a field of a dataclass
HELD = {
    "torch.utils.data.dataloader": ["_workers"],
    "torch.nn.modules.module": ["_forward_pre_hooks"],
    "megatron.core.optimizer.distrib_optimizer": [
        "model_fp32_groups", "model_float16_groups", "shard_fp32_groups", "shard_fp32_from_float16_groups",
    ],
    "megatron.core.optimizer.optimizer": [
        "float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups", "chained_optimizers",
    ],
    "deepspeed.utils.tensor_fragment": [
        "param_group_index", "hp_fragment_address", "lp_fragment_address", "start", "numel",
        "_hp_mapping",
    ],
    "deepspeed.utils.mixed_precision_linkage": ["_index_in_param_group"],
    "deepspeed.runtime.bf16_optimizer": ["bf16_groups_flat"],
    "deepspeed.runtime.zero.stage_1_and_2": [
        "bit16_groups_flat", "averaged_gradients", "all_grad_tensors", "micro_step_id", "cpu_offload",
    ],
    "deepspeed.runtime.zero.stage3": [
        "grad_position", "fp32_partitioned_groups_flat", "averaged_gradients", "micro_step_id",
        "offload_optimizer", "parameter_offload",
    ],
    "deepspeed.runtime.zero.partition_parameters": [
        "ds_tensor", "ds_shape", "ds_numel", "ds_process_group",
    ],
}  # fmt: skip


def pairs(names: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(module, name) for module, of_module in names.items() for name in of_module]


@pytest.mark.parametrize(("module", "name"), pairs(IMPORTED))
def test_a_name_can_be_imported(module: str, name: str) -> None:
    if name == "_dump_nccl_trace" and not dist.is_nccl_available():
        pytest.skip("this torch is built without NCCL")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize(("module", "name"), pairs(HELD))
def test_an_instance_holds(module: str, name: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    assigned = rf"(\.{name}\b[^=\n]*=[^=]|^ +self\.{name},$|^ +{name}: )"
    assert re.search(assigned, source, re.MULTILINE), f"{module}: no {name}"


def private_names(file: Path) -> set[str]:
    """Names with a leading underscore that a file takes from elsewhere: not from itself, nor from its own objects."""
    tree = ast.parse(file.read_text())
    own = {"self", "cls"} | set(sys.stdlib_module_names)
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("soar_mega"):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and not (
            (isinstance(node.value, ast.Name) and node.value.id in own)
            or (isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name))  # super()
        ):
            found.add(node.attr)
    public = {"_replace"}  # of a named tuple, whose fields may have any name without an underscore
    return {name for name in found - public if name.startswith("_") and not name.endswith("__")}


def test_no_other_file_uses_a_private_name() -> None:
    users = {file: private_names(file) for file in PACKAGE.rglob("*.py") if file.name not in HOMES}
    assert len(users) > 100 and {str(file): names for file, names in users.items() if names} == {}


def test_each_private_name_is_listed() -> None:
    listed = {part for _, name in pairs(IMPORTED) + pairs(HELD) for part in name.split(".")}
    used = private_names(PACKAGE / "private_names.py")
    assert used and used <= listed, used - listed
