"""A runner for code nobody has read: one container per job, no network, hard limits, results the job cannot forge."""

from infra.sandbox.job import Job, Kind, Limits, Result
from infra.sandbox.runner import Sandbox

__all__ = ["Job", "Kind", "Limits", "Result", "Sandbox"]
