"""Runs as jobs of a scheduler, and runs that follow each other."""
