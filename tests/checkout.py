"""The project's own code in a made-up checkout."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def give_code(root: Path) -> None:
    """Let `root`, which shall be `m1.paths.ROOT`, have the code of this checkout: fingerprints are made of it."""
    for name in ("infra", "kernels", "m1", "stages"):
        (root / name).symlink_to(CHECKOUT / name)
