"""How work that takes long is told to stop, on all ranks at once."""

from __future__ import annotations

from typing import Protocol


class StopSignal(Protocol):
    """Whether the work is asked to stop; `m1.training.stopping.StopRequest` is one."""

    def noticed(self) -> bool:
        """Whether this rank has been told."""
        ...

    def agreed(self) -> bool:
        """Whether any rank has been told, the same answer on all; every rank takes part."""
        ...
