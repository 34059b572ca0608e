"""Weights between diffusers folders and megatron layouts."""

from soar_mega.convert.export import save_folder, save_original_file
from soar_mega.convert.load import exact_shards, load_diffusers, load_weights
from soar_mega.convert.pipeline_folder import (
    is_pipeline,
    pipeline_parts,
    pipeline_schedule,
    scheduler_shift,
)
from soar_mega.convert.save import AS_STORED, WeightFiles

__all__ = [
    "AS_STORED",
    "WeightFiles",
    "exact_shards",
    "is_pipeline",
    "load_diffusers",
    "load_weights",
    "pipeline_parts",
    "pipeline_schedule",
    "save_folder",
    "save_original_file",
    "scheduler_shift",
]
