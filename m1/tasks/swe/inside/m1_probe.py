"""pytest plugin of the validation runs: outcomes, failures as a user would see them, and which test runs which line.

Runs inside the sandbox, beside the package under test, and imports nothing of this project. It reads `m1_probe.json`
(what to run) and writes `m1_found.json`, both in the folder above the tree, which cannot be written into; it writes
also when a test hangs: then the process ends at once.
"""

import json
import os
import signal
import sys
import time

import pytest

ROOT = os.getcwd() + os.sep
ABOVE = os.path.dirname(os.getcwd())
with open(os.path.join(ABOVE, "m1_probe.json"), encoding="utf-8") as _file:
    ASKED = json.load(_file)
RESULT: dict = {"outcomes": {}, "seconds": {}, "failures": {}, "collection_errors": [], "lines": {}, "hung": None}
SELECTED = None if ASKED["select"] is None else set(ASKED["select"])
COVERAGE = None
_running = {"id": None, "since": 0.0}


def _write():
    part = os.path.join(ABOVE, "m1_found.json.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(RESULT, file)
    os.replace(part, os.path.join(ABOVE, "m1_found.json"))


def _hung(signum, frame):
    RESULT["hung"] = _running["id"] or "collection"
    _write()
    os._exit(3)


def pytest_configure(config):
    global COVERAGE
    signal.signal(signal.SIGALRM, _hung)
    signal.setitimer(signal.ITIMER_REAL, ASKED["seconds_per_test"])
    if ASKED["coverage"]:
        import coverage

        COVERAGE = coverage.Coverage(data_file=None, include=[ROOT + part for part in ASKED["coverage"]])
        COVERAGE.start()


def pytest_collection_modifyitems(config, items):
    if SELECTED is not None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in SELECTED])
        items[:] = [item for item in items if item.nodeid in SELECTED]
    if ASKED["reverse"]:  # the files; where answers are judged, these come in any order
        items.sort(key=lambda item: item.nodeid.partition("::")[0], reverse=True)


def pytest_collectreport(report):
    if report.failed:
        RESULT["collection_errors"].append([report.nodeid, str(report.longrepr)[-2000:]])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _running["id"], _running["since"] = item.nodeid, time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, ASKED["seconds_per_test"])
    if COVERAGE is not None:
        COVERAGE.switch_context(item.nodeid)
    yield
    signal.setitimer(signal.ITIMER_REAL, ASKED["seconds_per_test"])
    if COVERAGE is not None:
        COVERAGE.switch_context("")
    RESULT["seconds"][item.nodeid] = round(time.perf_counter() - _running["since"], 4)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    nodeid = item.nodeid
    if report.failed:
        RESULT["outcomes"][nodeid] = "failed" if report.when == "call" else "error"
        if len(RESULT["failures"]) < ASKED["failures"] and nodeid not in RESULT["failures"]:
            RESULT["failures"][nodeid] = _failure(item, call.excinfo)
    elif report.when == "call" or report.skipped:
        RESULT["outcomes"].setdefault(nodeid, "xfailed" if hasattr(report, "wasxfail") else report.outcome)


def _failure(item, excinfo):
    """Exception, its text, and the frames below the root as [file, line, function], outermost first."""
    frames = []
    for entry in excinfo.traceback if excinfo is not None else []:
        path = str(entry.path)
        if path.startswith(ROOT):
            frames.append([path[len(ROOT) :], entry.lineno + 1, entry.name])
    try:
        text = str(excinfo.value)
    except Exception:
        text = ""
    return {
        "exception": excinfo.type.__name__ if excinfo is not None else "",
        "message": text[:2000],
        "frames": frames[-12:],
        "function": getattr(item, "originalname", None) or item.name,
        "parameters": repr(getattr(getattr(item, "callspec", None), "params", None) or "")[:500],
    }


def pytest_sessionfinish(session, exitstatus):
    signal.setitimer(signal.ITIMER_REAL, 0)
    RESULT["exit"] = int(exitstatus)
    if COVERAGE is not None:
        COVERAGE.stop()
        data = COVERAGE.get_data()
        for file in data.measured_files():
            lines = data.contexts_by_lineno(file)
            RESULT["lines"][file[len(ROOT) :]] = {str(line): sorted(set(names)) for line, names in lines.items()}
    RESULT["python"] = sys.version.split()[0]
    _write()
