"""A runner for untrusted code: one container per job, no network, hard limits, results the job cannot forge."""

from infra.sandbox.provider import DockerSandboxes
from infra.sandbox.runner import Sandbox
from m1.tasks.sandbox import Job, Kind, Limits, Result

__all__ = ["DockerSandboxes", "Job", "Kind", "Limits", "Result", "Sandbox"]
