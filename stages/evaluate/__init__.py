"""Held-out pass@1 of every checkpoint of a run, task by task."""
