"""Prompts for reinforcement learning and evaluation, from task generators with verifiers."""
