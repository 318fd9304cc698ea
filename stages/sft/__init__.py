"""Supervised cold start (MiniMax-M1 report §2.2): loss on the response only, reasoning inside think tags."""
