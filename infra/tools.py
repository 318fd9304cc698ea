"""What task families may need besides the process they run in, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping

from m1.errors import M1Error, ServiceError
from m1.run.stage import Demand, Need
from m1.tasks.sandbox import Sandboxes

#: The module behind each need; its code is part of the identity of a stage that uses it.
MODULES = {Need.SANDBOX: "infra.sandbox"}


def modules(demands: Mapping[str, Demand]) -> tuple[str, ...]:
    """Modules behind these demands."""
    return tuple(dict.fromkeys(MODULES[demand.need] for demand in demands.values() if demand.need in MODULES))


def missing(need: Need) -> M1Error | None:
    """Why a need is not met at this moment, and how to meet it; None if it is met."""
    if need is Need.SANDBOX:
        from infra.sandbox import engine

        return engine.missing()
    return ServiceError(f"no {need.value} can be reached yet", "Leave out the tasks that it judges.")


class Tools:
    """Opens what the families need; see `m1.tasks.base.Tools`."""

    def sandboxes(self) -> Sandboxes:
        """Docker's.

        Raises:
            ServiceError: no engine answers.
        """
        from infra.sandbox import DockerSandboxes, engine

        engine.client()
        return DockerSandboxes()
