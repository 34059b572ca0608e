"""A run: its loop, checkpoints, measurements, logs and signals."""
