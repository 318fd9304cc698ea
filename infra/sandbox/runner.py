"""The runner: a pool of warm containers, each used for one job."""

from __future__ import annotations

from collections.abc import Iterable

from infra.sandbox.job import Job, Limits, Result


class Sandbox:
    """Runs jobs in containers of one image.

    Args:
        image: tag as `m1 sandbox images` lists it, for example "m1-swe-python".
        runtime: runtime class of the engine (runsc, kata, ...); None for the engine's own default.
        warm: containers kept ready; 0 makes one when a job comes.
        limits: of the containers that are made ready before the first job.

    Raises:
        ServiceError: no engine answers, or it does not have the image or the runtime.
    """

    def __init__(
        self, image: str, runtime: str | None = None, warm: int = 2, limits: Limits | None = None
    ) -> None:
        raise NotImplementedError

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all containers of this sandbox."""
        raise NotImplementedError

    def run(self, job: Job) -> Result:
        """Run one job; never raises for what the job does."""
        raise NotImplementedError

    def run_many(self, jobs: Iterable[Job], workers: int = 2) -> list[Result]:
        """Results in the order of the jobs."""
        raise NotImplementedError
