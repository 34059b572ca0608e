"""Exports for trainers of other repositories: what they read, whether it is there, and how to start them."""
