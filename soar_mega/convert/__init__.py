"""Weights between diffusers folders and megatron layouts."""

from soar_mega.convert.load import load_diffusers, load_weights
from soar_mega.convert.pipeline import read_pipeline_config, save_pipeline, scheduler_shift
from soar_mega.convert.save import save_transformer

__all__ = [
    "load_diffusers",
    "load_weights",
    "read_pipeline_config",
    "save_pipeline",
    "save_transformer",
    "scheduler_shift",
]
