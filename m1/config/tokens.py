"""Token data sets."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section


class Tokens(Section):
    """Megatron indexed data sets."""

    heldout_fraction: float = Field(gt=0, lt=0.5)
