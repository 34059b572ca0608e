"""Checkpoints of a run: written, verified, read at any layout, and what a run's folder holds beside them."""
