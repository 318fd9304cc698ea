"""Staged context extension (MiniMax-M1 report §2.1): each stage at least doubles length, and raises the RoPE base."""
