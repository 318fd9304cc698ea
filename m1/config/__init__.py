"""Typed settings, one module for each owner; `m1.run.profiles` reads a whole profile."""
