"""MMDiT transformers as megatron-core modules."""
