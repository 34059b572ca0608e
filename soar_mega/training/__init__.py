"""A run: its loop, steps, measurements, logs and export."""
