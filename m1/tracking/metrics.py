"""From a stage's metrics.jsonl to an MLflow run, in batches, from a thread that never disturbs the stage."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from m1.errors import ServiceError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

#: MLflow's pages become slow with many keys in one run. Curves may use this many, final values the rest.
MAX_CURVES = 60
MAX_KEYS = 80
BATCH = 1000  # MLflow's own limit of metrics in one request
POLL_SECONDS = 1.0


def metric_key(raw: str) -> str:
    """`raw` with only what MLflow allows in a metric's name: letters, digits, "_", "-", ".", ":", spaces, slashes."""
    key = re.sub(r"[^\w\-.: /]", "_", raw.replace("@", "_at_"), flags=re.ASCII)
    parts = [part.strip() for part in key.split("/")]
    return "/".join(part for part in parts if part.strip("."))[:240] or "_"


class MetricKeys:
    """Names of one run's metrics: distinct raw keys get distinct names, and there is a limit to how many there are."""

    def __init__(self, used: set[str] | None = None) -> None:
        self._names: dict[str, str] = {}
        self._used = set(used or ())
        self._earlier = set(used or ())
        self.left_out: set[str] = set()

    def __contains__(self, raw: str) -> bool:
        return raw in self._names

    @property
    def names(self) -> tuple[str, ...]:
        """Names in MLflow that the run has."""
        return tuple(sorted(self._used))

    def name(self, raw: str, limit: int) -> str | None:
        """The MLflow name of `raw`, or None when the run already has `limit` others."""
        if raw in self._names:
            return self._names[raw]
        name = metric_key(raw)
        if name in self._names.values():
            name = f"{name[:230]}-{crc32(raw.encode()):08x}"
        if name not in self._earlier and len(self._used) >= limit:
            self.left_out.add(raw)
            return None
        self._used.add(name)
        self._names[raw] = name
        return name


class Follower:
    """Tails a metrics.jsonl and forwards it with `MlflowClient.log_batch`.

    A failed request is tried again at the next poll; only what still cannot be sent when `stop` is called is an error.

    Args:
        file: metrics.jsonl; need not exist yet.
        earlier: names of the metrics that the run has from an earlier attempt. A stage that continues from its last
            checkpoint repeats some steps; the run keeps their first values.
    """

    def __init__(self, client: MlflowClient, run_id: str, file: Path, keys: MetricKeys, earlier: set[str]) -> None:
        self._client, self._run_id, self._file = client, run_id, file
        self._keys, self._earlier = keys, earlier
        self._sent: set[tuple[str, int]] = set()
        self._offset = 0
        self._inode = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"metrics-{run_id[:8]}", daemon=True)
        self.not_finite: list[str] = []
        self.last_step = 0
        #: Name in MLflow -> value of the highest step that was sent.
        self.last_values: dict[str, float] = {}
        self._error: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Forward what is left.

        Raises:
            ServiceError: some of it could not be sent.
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=120)
        self._pump()
        if self._error is not None:
            raise ServiceError(
                f"MLflow did not take the metrics of {self._file} (run {self._run_id}): {first_line(self._error)}",
                "Look at `m1 status`, start the server with `m1 up`, and rerun: finished stages are kept.",
            ) from self._error

    def _loop(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._pump()

    def _pump(self) -> None:
        with self._lock:
            try:
                while self._earlier:
                    key = next(iter(self._earlier))
                    self._sent |= {(key, point.step) for point in self._client.get_metric_history(self._run_id, key)}
                    self._earlier.remove(key)
                while self._forward_batch():
                    pass
                self._error = None
            except Exception as error:  # whatever it is, it must not end the thread or reach the stage
                self._error = error

    def _forward_batch(self) -> bool:
        """Send the next lines, up to one request; True if there may be more."""
        metrics: dict[tuple[str, int], Metric] = {}
        faults: list[str] = []
        offset, last_step, full = self._offset, self.last_step, False
        for text, end in self._lines():
            step, fresh, unfit = self._parse(text)
            if metrics and len(metrics) + len(fresh) > BATCH:
                full = True
                break
            metrics = fresh | metrics  # the first value of a step stays
            faults += unfit
            last_step = max(last_step, step)
            offset = end
        if metrics:
            self._client.log_batch(self._run_id, metrics=list(metrics.values()))
        # Only now: a request that failed is built anew from the same lines.
        self._sent.update(metrics)
        self.last_values |= {metric.key: metric.value for metric in sorted(metrics.values(), key=lambda m: m.step)}
        self.not_finite += faults
        self._offset, self.last_step = offset, last_step
        return full

    def _parse(self, text: bytes) -> tuple[int, dict[tuple[str, int], Metric], list[str]]:
        """Step, metrics not sent yet by (name, step), and what is not a finite number, of one line."""
        from mlflow.entities import Metric

        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            return 0, {}, []  # a line cut by a kill
        if not isinstance(line, dict) or "metrics" not in line:
            return 0, {}, []
        step = line["step"]
        fresh: dict[tuple[str, int], Metric] = {}
        unfit: list[str] = []
        for raw, value in line["metrics"].items():
            if not math.isfinite(value):
                unfit.append(f"{raw} at step {step}")
            elif (name := self._keys.name(raw, MAX_CURVES)) is not None and (name, step) not in self._sent:
                fresh[name, step] = Metric(name, value, int(line["time"] * 1000), step)
        return step, fresh, unfit

    def _lines(self) -> list[tuple[bytes, int]]:
        """Complete lines from the offset on, each with the offset behind it."""
        if not self._file.exists():
            return []
        with open(self._file, "rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._offset, self._inode = 0, stat.st_ino  # the stage has taken back what it will do again
            file.seek(self._offset)
            content = file.read()
        lines, end = [], self._offset
        for text in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            end += len(text)
            lines.append((text, end))
        return lines


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
