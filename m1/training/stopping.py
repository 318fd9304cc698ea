"""SIGTERM as a request: the training goes on to the next point where its state is whole, saves it, and ends.

A rank that is deep inside a collective or a kernel does not run Python's signal handlers, so a thread watches for the
signal and ends the process when the time allowed for the checkpoint is over.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.distributed

from m1.errors import Interrupted


class StopRequested(Exception):
    """Raised inside a step that is abandoned: every rank has left it, and the state is that before the step."""


class StopRequest:
    """Whether SIGTERM has been sent to any rank.

    Args:
        seconds: from the signal to the end of the process, checkpoint or not.
        stage: name used in the message when the time was too short.
    """

    def __init__(self, seconds: float, stage: str) -> None:
        self.seconds, self.stage = seconds, stage
        self._noticed, self._over = threading.Event(), threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # The handler itself does nothing: Python writes the signal's number into the pipe the moment it arrives.
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def noticed(self) -> bool:
        """Whether this rank has been told; the others may not know yet."""
        return self._noticed.is_set()

    def agreed(self) -> bool:
        """Whether any rank has been told, the same answer on all; every rank takes part."""
        told = torch.tensor([int(self.noticed())], device=torch.cuda.current_device())
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.item())

    def close(self) -> None:
        """The work is done or its checkpoint written: no deadline any more, and SIGTERM means what it did before."""
        if self._over.is_set():
            return
        self._over.set()
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGTERM, self._handler)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _watch(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] == signal.SIGTERM:
                self._noticed.set()
                if not self._over.wait(self.seconds):
                    self._give_up()
                return

    def _give_up(self) -> None:
        print(
            f"error: {self.stage} was stopped by SIGTERM and had no new checkpoint complete within {self.seconds:g} s. "
            "Rerun it: it continues from the last complete one, if there is any.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(Interrupted.exit_code)
