"""One package per step of the recipe; each reads its inputs, does its work and writes its outputs."""
