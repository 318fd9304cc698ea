"""Progress of a flow run in the terminal: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from infra.flow_runs import Event
from m1.cli.tables import number, table
from m1.run.folder import Progress, read_progress
from m1.run.summary import StageRow

_LINE_SECONDS = 10.0


class Display:
    """Shows the events of one flow run; a context manager, so that the terminal is left as it was."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self.seen = 0
        self.running: Event | None = None
        self.output: Path | None = None
        self.next_line = 0.0
        self.waits = False

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            self.live = Live(auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.update("", refresh=True)  # the summary table follows
            self.live.stop()

    def show(self, events: list[Event]) -> None:
        """Take in new events and show the present state."""
        fresh, self.seen = events[self.seen :], len(events)
        for event in fresh:
            self._take(event)
            if self.live is None and (line := _line(event)):
                print(line, flush=True)
        if self.live is not None:
            self.live.update(self._table(events), refresh=True)
        elif self.running is not None and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + _LINE_SECONDS
            if (progress := self._progress()) is not None:
                print(f"  {self.running.stage:<18} {progress.percent:3.0f}%  {progress.text}", flush=True)

    def waiting(self, state: str, events: int) -> None:
        """Say once that another flow run has the machine."""
        if not events and "Concurrency" in state and not self.waits:
            self.waits = True
            print("waiting: another flow run is at work, one runs at a time", flush=True)

    def _take(self, event: Event) -> None:
        if event.kind == "started":
            self.running, self.output = event, None
            self.next_line = time.monotonic() + _LINE_SECONDS
        elif event.kind == "stage running" and event.output:
            self.output = Path(event.output)
        elif event.kind in ("stage ended", "stage killed", "failed", "finished"):
            self.running = None

    def _progress(self) -> Progress | None:
        return read_progress(self.output) if self.output is not None else None

    def _table(self, events: list[Event]) -> Table:
        made = table(None, "stage", "state", "time", "progress", "", right=("time",))
        planned = next((event.plan for event in events if event.kind == "planned"), ())
        ended = {event.stage: event.row for event in events if event.row is not None}
        for each in planned:
            row = ended.get(each.stage)
            if row is not None:
                made.add_row(each.stage, row.status, f"{row.seconds:.0f} s", *_result(row))
            elif self.running and self.running.stage == each.stage:
                progress = self._progress() or Progress(0.0, "")
                seconds = time.time() - self.running.time
                bar = ProgressBar(100, progress.percent, width=24)
                made.add_row(each.stage, "running", f"{seconds:.0f} s", bar, progress.text)
            else:
                made.add_row(each.stage, f"to {each.action}", "", "", "")
        return made


def _result(row: StageRow) -> tuple[str, str]:
    remark = "; ".join(row.left_out)
    if row.key_metric and row.after is not None:
        return f"{row.key_metric} {number(row.before)} -> {number(row.after)}", remark
    return "", remark


def _line(event: Event) -> str | None:
    """What is printed of an event where there is no terminal."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    if event.kind == "planned":
        will = sum(each.action == "run" for each in event.plan)
        return f"{clock} {len(event.plan)} stages, {will} to run"
    if event.kind == "stage ended" and event.row is not None:
        return f"{clock} {event.stage:<18} {_ended(event.row)}"
    if event.kind == "stage running":
        return f"{clock} {event.stage:<18} runs: {event.message}"
    if event.kind == "stage killed":
        return f"{clock} {event.stage:<18} tries again: {event.message}"
    return None


def _ended(row: StageRow) -> str:
    if row.status == "skipped":
        return f"skipped: {row.reason}"
    if row.status == "failed":
        return f"failed after {row.seconds:.1f} s"
    return f"{row.seconds:.1f} s  {'  '.join(filter(None, _result(row)))}"
