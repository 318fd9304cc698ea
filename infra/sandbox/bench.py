"""`m1 bench sandbox`: what the sandbox costs.

A table for people goes to stderr, one JSON object per case to stdout:
``{"case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "spread"}``; ratio above 1 means ours is better.
Ours and the peer run in turn within every repeat; `ratio` is the median of the ratios of the repeats, `spread` their
range. The job is a pytest run of three small tests.

- throughput: warm pool against a container made for each job, two workers each, so that no core is ever idle;
- latency: the same two, one job at a time: how long it waits where there is time to make containers between jobs;
- latency: one run in a warm container against pytest started bare on this machine, without any isolation;
- latency of a command: an empty Python program in a warm container and bare: the fixed cost of a job.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.sandbox.check import newest_with_pytest
from infra.sandbox.pytest_run import run_tests
from infra.sandbox.runner import Sandbox
from m1.errors import ServiceError
from m1.tasks.sandbox import Job, Kind, Limits

FILES: dict[str, bytes | str] = {
    "package/__init__.py": "def double(x):\n    return 2 * x\n",
    "tests/test_double.py": "import pytest\nfrom package import double\n\n"
    "@pytest.mark.parametrize('x', [1, 2, 3])\ndef test_double(x):\n    assert double(x) == x + x\n",
}
LIMITS = Limits(memory_mb=256, work_mb=64)
WORKERS = 2


def main(arguments: list[str] | None = None) -> None:
    """Run all cases.

    Raises:
        ServiceError: no engine, no image, or a job that does not pass.
    """
    parser = argparse.ArgumentParser(prog="m1 bench sandbox", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer jobs and repeats, about a minute")
    parser.add_argument("--image", help="environment with pytest; default the newest")
    parser.add_argument("--runtime", help="runtime class: runc, runsc, kata, ...")
    options = parser.parse_args(arguments)
    repeats, jobs = (3, 6) if options.quick else (5, 20)
    image = options.image or newest_with_pytest()
    _row("case", "metric", "ours", "peer", "peer name", "ratio", "spread")
    with (
        Sandbox(image, options.runtime, warm=WORKERS, limits=LIMITS) as warm,
        Sandbox(image, options.runtime, warm=0) as cold,
        tempfile.TemporaryDirectory(prefix="m1-bench-") as folder,
    ):
        for path, content in FILES.items():
            (Path(folder) / path).parent.mkdir(exist_ok=True)
            (Path(folder) / path).write_text(str(content), encoding="utf-8")
        _test(warm)
        pairs = _in_turn(repeats, lambda: _rate(warm, jobs), lambda: _rate(cold, jobs))
        _report("short test run, 2 workers", "throughput", "jobs/s", pairs, "container per job", larger=True)
        pairs = _in_turn(2 * repeats, lambda: _time(lambda: _test(warm)), lambda: _time(lambda: _test(cold)))
        _report("short test run", "latency", "s", pairs, "container per job", larger=False)
        pairs = _in_turn(2 * repeats, lambda: _time(lambda: _test(warm)), lambda: _time(lambda: _bare(folder)))
        _report("short test run", "latency", "s", pairs, "bare pytest", larger=False)
        pairs = _in_turn(2 * repeats, lambda: _time(lambda: _empty(warm)), lambda: _time(_bare_empty))
        _report("empty Python program", "latency", "s", pairs, "bare process", larger=False)


def _test(sandbox: Sandbox) -> None:
    report = run_tests(sandbox, FILES, ["tests"], LIMITS)
    if set(report.outcomes.values()) != {"passed"}:
        raise ServiceError(f"a job of the bench ended with {report}", "See `m1 sandbox check`.")


def _empty(sandbox: Sandbox) -> None:
    result = sandbox.run(Job({}, ["python3", "-I", "-S", "-c", ""], LIMITS))
    if result.kind is not Kind.OK:
        raise ServiceError(f"a job of the bench ended with {result}", "See `m1 sandbox check`.")


def _bare(folder: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": folder, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += ["--rootdir", folder, f"{folder}/tests"]
    subprocess.run(command, check=True, capture_output=True, env=environment)


def _bare_empty() -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)


def _in_turn(repeats: int, ours: Callable[[], float], peer: Callable[[], float]) -> list[tuple[float, float]]:
    pairs = []
    for repeat in range(1, repeats + 1):
        pairs.append((ours(), peer()))
        print(f"  {repeat} of {repeats}: {pairs[-1][0]:.3f} against {pairs[-1][1]:.3f}", file=sys.stderr, flush=True)
    return pairs


def _time(work: Callable[[], None]) -> float:
    # A pause, so that the pool is warm again: what is measured is how long a job waits, not how fast the pool fills.
    time.sleep(1.0)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _rate(sandbox: Sandbox, jobs: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as threads:
        list(threads.map(lambda _: _test(sandbox), range(jobs)))
    return jobs / (time.perf_counter() - started)


def _report(
    case: str, metric: str, unit: str, pairs: list[tuple[float, float]], peer_name: str, *, larger: bool
) -> None:
    ratios = [ours / peer if larger else peer / ours for ours, peer in pairs]
    record = {
        "case": case,
        "metric": metric,
        "unit": unit,
        "ours": round(statistics.median(ours for ours, _ in pairs), 4),
        "peer": round(statistics.median(peer for _, peer in pairs), 4),
        "peer_name": peer_name,
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    print(json.dumps(record), flush=True)
    shown = f"{record['ours']} {unit}", f"{record['peer']} {unit}"
    _row(case, metric, *shown, peer_name, str(record["ratio"]), f"{min(ratios):.2f} to {max(ratios):.2f}")


def _row(*cells: str) -> None:
    widths = (28, 12, 16, 16, 20, 8, 16)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
