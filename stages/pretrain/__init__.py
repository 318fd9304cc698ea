"""Continual pretraining on the tokenised corpus (MiniMax-M1 report §2.1): constant, then decaying learning rate."""
