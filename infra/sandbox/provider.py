"""Docker's sandboxes as the task families see them (`m1.tasks.sandbox.Sandboxes`)."""

from __future__ import annotations

from collections.abc import Sequence

from infra.sandbox.images import build_environment
from infra.sandbox.runner import Sandbox
from m1.tasks.sandbox import Limits


class DockerSandboxes:
    """Environments as Docker images, sandboxes as pools of containers."""

    def build(self, name: str, requirements: Sequence[str]) -> str:
        """The image of an environment; see `images.build_environment`."""
        return build_environment(name, list(requirements))

    def open(self, image: str, *, warm: int = 2, limits: Limits | None = None, preload: bool = True) -> Sandbox:
        """A sandbox, which is its own context manager."""
        return Sandbox(image, warm=warm, limits=limits, preload=preload)
