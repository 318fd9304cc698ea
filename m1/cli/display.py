"""Progress of a flow run in the terminal: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from infra import flow_runs
from m1.cli.tables import number, table

_LINE_SECONDS = 10.0


class Display:
    """Shows the events of one flow run; a context manager, so that the terminal is left as it was."""

    def __init__(self) -> None:
        self.live: Any = None
        self.seen = 0
        self.running: dict[str, Any] | None = None
        self.output: Path | None = None
        self.next_line = 0.0
        self.waits = False

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(auto_refresh=False)
            self.live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.live is not None:
            self.live.update("", refresh=True)  # the summary table follows
            self.live.__exit__(*exc)

    def show(self, events: list[dict[str, Any]]) -> None:
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
                print(f"  {self.running['stage']:<18} {progress[0]:3.0f}%  {progress[1]}", flush=True)

    def waiting(self, state: str, events: int) -> None:
        """Say once that another flow run has the machine."""
        if not events and "Concurrency" in state and not self.waits:
            self.waits = True
            print("waiting: another flow run is at work, one runs at a time", flush=True)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "started":
            self.running, self.output = event, None
            self.next_line = time.monotonic() + _LINE_SECONDS
        elif kind == "stage running" and "output" in event:
            self.output = Path(event["output"])
        elif kind in ("stage ended", "stage killed", "failed", "finished"):
            self.running = None

    def _progress(self) -> tuple[float, str] | None:
        return flow_runs.read_progress(self.output) if self.output is not None else None

    def _table(self, events: list[dict[str, Any]]) -> Any:
        from rich.progress_bar import ProgressBar

        made = table(None, "stage", "state", "time", "progress", "", right=("time",))
        planned = next((event for event in events if event["event"] == "planned"), None)
        ended = {event["stage"]: event for event in events if event["event"] == "stage ended"}
        for row in planned["plan"] if planned else []:
            stage = row["stage"]
            if stage in ended:
                made.add_row(stage, ended[stage]["status"], f"{ended[stage]['seconds']:.0f} s", *_result(ended[stage]))
            elif self.running and self.running["stage"] == stage:
                percent, remark = self._progress() or (0.0, "")
                seconds = time.time() - self.running["time"]
                made.add_row(stage, "running", f"{seconds:.0f} s", ProgressBar(100, percent, width=24), remark)
            else:
                made.add_row(stage, f"to {row['action']}", "", "", "")
        return made


def _result(event: dict[str, Any]) -> tuple[str, str]:
    remark = "; ".join(event.get("left_out", []))
    if event.get("key_metric") and event.get("after") is not None:
        return f"{event['key_metric']} {number(event.get('before'))} -> {number(event['after'])}", remark
    return "", remark


def _line(event: dict[str, Any]) -> str | None:
    kind = event["event"]
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    if kind == "planned":
        will = sum(row["action"] == "run" for row in event["plan"])
        return f"{clock} {len(event['plan'])} stages, {will} to run"
    if kind == "stage ended" and event["status"] == "skipped":
        return f"{clock} {event['stage']:<18} skipped: {event['reason']}"
    if kind == "stage ended" and event["status"] == "failed":
        return f"{clock} {event['stage']:<18} failed after {event['seconds']:.1f} s"
    if kind == "stage ended":
        shown = "  ".join(filter(None, _result(event)))
        return f"{clock} {event['stage']:<18} {event['seconds']:.1f} s  {shown}"
    if kind == "stage running":
        return f"{clock} {event['stage']:<18} runs: {event['reason']}"
    if kind == "stage killed":
        return f"{clock} {event['stage']:<18} tries again: {event['message']}"
    return None
