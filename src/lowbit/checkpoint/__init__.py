"""Checkpoints on disk: what is in them, what becomes of each weight, and writing the result."""
