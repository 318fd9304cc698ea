"""The one error style of the project: one line that says what is wrong, and what to do about it."""

from __future__ import annotations


class M1Error(Exception):
    """A fault the user can act on.

    Args:
        what: what is wrong, naming the thing (file, field, port, stage) and its value.
        hint: what to do about it, as an imperative sentence; may be empty when `what` says it all.
    """

    #: Process exit code of a command that ends with this error.
    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = " ".join(what.split())
        self.hint = " ".join(hint.split())
        super().__init__(f"{self.what}. {self.hint}" if self.hint else self.what)


class UsageError(M1Error):
    """Bad input from the user: a profile, an option, a missing file. Nothing has been started."""

    exit_code = 2


class StageFailed(M1Error):
    """A stage's own process ended without a result."""

    exit_code = 3


class ServiceError(M1Error):
    """A service (Prefect, MLflow, the sandbox's engine, a port, the disk) is not usable."""

    exit_code = 4


class Interrupted(M1Error):
    """Work stopped on request (SIGTERM, SIGINT); what it had saved before is still there."""

    exit_code = 75


class Checkpointed(Interrupted):
    """A stage stopped on request (SIGTERM) after writing a checkpoint of that moment."""

    exit_code = 85

    @classmethod
    def after(cls, stage: str, step: int, checkpoint: object) -> Checkpointed:
        """For the last `step` that was done and the folder of the complete checkpoint."""
        return cls(
            f"stage {stage} was stopped by SIGTERM and has saved its state after step {step} in {checkpoint}",
            "Run the same command again: it goes on from there as if it had never stopped.",
        )
