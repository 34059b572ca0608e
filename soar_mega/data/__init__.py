"""Samples: shards of encoded images and captions, their order, and the loader that hands them to a run."""
