"""SOAR post-training of rectified-flow transformers on megatron-core. Importing this name alone is cheap."""

__version__ = "0.1.0"
