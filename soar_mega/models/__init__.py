"""Transformers as megatron-core modules: what all have in common, and each family of them in a folder of its own."""
