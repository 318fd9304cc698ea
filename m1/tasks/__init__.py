"""Verifiable tasks by family: how they are made, put to a model, and how answers are judged."""
