"""The checkpoints of one stage run: where it goes on, when it saves, which are kept, and what SIGTERM does."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed

from m1.config.running import Checkpoints
from m1.errors import Checkpointed, UsageError
from m1.run.contract import StageContext
from m1.training import checkpoint
from m1.training.stopping import StopRequest
from m1.training.trainer import Trainer

log = logging.getLogger(__name__)


class Saver:
    """Saves a stage's training to `<run folder>/checkpoints` and finds it again there.

    `state` is always what the stage needs besides model and optimizer, as JSON values: "step", and whatever tells the
    position in its data. Every method is called by all ranks at the same point.
    """

    def __init__(self, context: StageContext, trainer: Trainer) -> None:
        self.context, self.trainer = context, trainer
        self.settings: Checkpoints = context.profile.checkpoints
        self.folder = context.output / "checkpoints"
        self.stop = StopRequest(self.settings.stop_seconds, context.stage)
        # A process forked beside threads is safe on Linux only; elsewhere the training waits for it.
        self._beside = self.settings.asynchronous and sys.platform == "linux"
        self._writer = checkpoint.Writer()
        self._newest: Path | None = None
        self._damaged: list[Path] = []

    def resume(self) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint, optimizer and all; returns its state, or None where there is none.

        A run that was asked to continue another one (`--resume`) takes that one's until it has its own.
        """
        if self.context.rank == 0:
            checkpoint.remove_leftovers(self.folder)
        torch.distributed.barrier()
        self._newest = found = checkpoint.newest(self.folder)
        self._damaged = [path for path in checkpoint.step_folders(self.folder) if found is None or path > found]
        if found is None and self.context.request.resume is not None:
            found = checkpoint.newest(Path(self.context.request.resume) / "checkpoints")
            if found is None:
                raise UsageError(
                    f"{self.context.stage}: {self.context.request.resume} holds no undamaged checkpoint",
                    "Name another run with --resume, or leave it out to start from the beginning.",
                )
        if found is None:
            if self._damaged and self.context.rank == 0:
                log.warning("%s: no undamaged checkpoint is left, it starts from the beginning", self.context.stage)
            return None
        state = self.trainer.load(found, verified=True)
        self.context.continue_after(state["step"])
        if self.context.rank == 0:
            print(f"{self.context.stage} continues after step {state['step']} from {found}", flush=True)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Begin a checkpoint of this moment; it becomes complete while the training goes on."""
        self.settle()
        self._begin(state)
        if not self._beside:
            self.settle()

    def stop_if_asked(self, state: dict[str, Any]) -> None:
        """Called between steps: ends the stage with a checkpoint of `state` if SIGTERM has come."""
        self._finished(self._writer.poll())
        if self.stop.agreed():
            self.leave(state)

    def leave(self, state: dict[str, Any]) -> NoReturn:
        """Save `state` and end the stage.

        Raises:
            Checkpointed: always.
        """
        folder = self._complete(state)
        self.context.write_interruption(state["step"], folder)
        torch.distributed.barrier()
        self.stop.close()
        # torchrun sends SIGTERM to the ranks that are left when the first has ended; they end by themselves.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Checkpointed.after(self.context.stage, state["step"], folder)

    def finish(self, state: dict[str, Any]) -> Path:
        """The stage's final checkpoint, complete; earlier ones are removed but for those that `keep_every` keeps."""
        folder = self._complete(state)
        self._retain(keep=1)
        self.stop.close()
        return folder

    def settle(self) -> None:
        """Wait for a checkpoint that is being written. Called before an error that all ranks raise together."""
        self._finished(self._writer.wait())

    def _complete(self, state: dict[str, Any]) -> Path:
        """The complete checkpoint of `state`, written now unless it is there."""
        self.settle()
        folder = checkpoint.step_folder(self.folder, state["step"])
        if self._newest != folder:
            self._begin(state)
            self.settle()
        return folder

    def _begin(self, state: dict[str, Any]) -> None:
        folder = checkpoint.step_folder(self.folder, state["step"])
        self.trainer.begin_save(self._writer, folder, state)

    def _finished(self, folder: Path | None) -> None:
        if folder is not None:
            self._newest = folder
            self._retain(self.settings.keep)

    def _retain(self, keep: int) -> None:
        """Remove what is no longer kept; damaged ones as soon as a newer complete one has taken their place."""
        if self.context.rank == 0:
            for folder in self._damaged:
                if folder.exists() and folder != self._newest:
                    checkpoint.remove(folder)
            folders = {int(path.name.removeprefix("step_")): path for path in checkpoint.step_folders(self.folder)}
            for step in surplus(list(folders), keep, self.settings.keep_every):
                checkpoint.remove(folders[step])
        self._damaged = []


def surplus(steps: list[int], keep: int, keep_every: int | None) -> list[int]:
    """Which of these steps' checkpoints to remove: all but the newest `keep` and the multiples of `keep_every`."""
    older = sorted(steps)[:-keep]
    return [step for step in older if keep_every is None or step % keep_every]
