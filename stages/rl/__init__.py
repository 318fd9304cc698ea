"""Reinforcement learning with CISPO: the stages rl-40k and rl-80k (MiniMax-M1 report §3 to §5)."""
