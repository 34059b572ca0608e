"""What no family of models owns."""
