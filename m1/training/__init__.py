"""Parallel set-up, training steps, checkpoints and data for every stage that trains."""
