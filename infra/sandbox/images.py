"""Images of the sandbox: content-addressed, built without any registry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Image:
    """One image of ours.

    Attributes:
        tag: name to give to `Sandbox`; content: digest of all that went in; packages: what is installed on top.
    """

    tag: str
    content: str
    size: int
    created: str
    packages: tuple[str, ...]


def build_base(method: str = "debootstrap", *, force: bool = False) -> str:
    """Make the base image, or find it; return its tag."""
    raise NotImplementedError


def build_environment(name: str, requirements: list[str], base: str | None = None) -> str:
    """Make the image `m1-swe-<name>` with pinned packages on top of the base, or find it; return its tag."""
    raise NotImplementedError


def list_images() -> list[Image]:
    """All images of ours that the engine holds."""
    raise NotImplementedError
