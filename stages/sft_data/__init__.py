"""Worked answers for supervised fine-tuning, from the task generators."""
